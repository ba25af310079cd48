"""Client and device server for real: sockets, descriptors, shared memory, processes that die."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from gms_core.client import ReadLease, WriteLease
from gms_core.errors import (
    AcquireTimeout,
    AllocationTooLarge,
    ConnectionLost,
    ForkedSession,
    IdentityMismatch,
    OutOfMemory,
    SessionClosed,
)
from gms_core.layout import Identity
from gms_core.protocol.messages import Export
from tests.conftest import SERVE, end_keeper, running_server
from tests.unit.publishing import MODEL, PAGE, publish, read_all


def test_reader_sees_the_bytes_when_the_writer_has_committed(server):
    data = os.urandom(100 * PAGE + 17)
    with server.connect() as writer, server.connect() as reader:
        published = publish(writer, data)
        lease = reader.acquire("weights", "auto", MODEL, timeout_s=1)
        assert isinstance(lease, ReadLease)
        assert lease.layout.manifest == b"manifest"
        assert lease.layout.digest == published.layout.digest
        assert read_all(reader, lease, len(data)) == data
        assert writer.driver.read(published.arena.base, len(data)) == data
        lease.release()
        published.release()


def test_last_slab_is_trimmed_when_the_draft_is_committed(server):
    with server.connect() as session:
        lease = publish(session, b"x" * (20 * PAGE), slab=16 * PAGE)
        assert [allocation.size for allocation in lease.layout.allocations] == [16 * PAGE, 4 * PAGE]
        assert session.status().allocated_bytes == 20 * PAGE
        assert session.driver.read(lease.arena.base, 20 * PAGE) == b"x" * (20 * PAGE)
        lease.release()


def test_unused_slabs_are_given_back_when_the_draft_is_committed(server):
    with server.connect() as session:
        lease = session.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=16 * PAGE)
        lease.arena.reserve_exact(64 * PAGE)
        lease.arena.allocate(PAGE)
        read = lease.commit(b"", MODEL)
        assert session.status().allocated_bytes == PAGE
        read.release()


def test_layout_survives_when_the_writer_is_gone(server):
    with server.connect() as writer:
        publish(writer, b"weights").release()
    with server.connect() as reader:
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        assert read_all(reader, lease, 7) == b"weights"
        lease.release()


def test_memory_keeps_its_addresses_when_it_is_unmapped_and_remapped(server):
    with server.connect() as session:
        lease = publish(session, b"weights")
        base = lease.arena.base
        lease.unmap()
        assert not lease.arena.mapped
        lease.remap()
        assert lease.arena.base == base
        assert session.driver.read(base, 7) == b"weights"
        lease.release()


WRITE_TO_READER = """
import ctypes, sys
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
session = connect(socket_path=Path(sys.argv[1]))
lease = session.acquire("weights", "ro", Identity({"content": "abc", "dtype": "bf16"}), timeout_s=1)
ctypes.memset(lease.map().base, 1, 1)
"""


def test_process_dies_by_sigsegv_when_it_writes_to_a_shared_weight(server):
    with server.connect() as writer:
        lease = publish(writer, b"weights")
        ended = subprocess.run([sys.executable, "-c", WRITE_TO_READER, str(server.socket)], check=False)
        assert ended.returncode == -signal.SIGSEGV
        assert writer.driver.read(lease.arena.base, 7) == b"weights"
        lease.release()


WRITE_AND_HANG = """
import sys, time
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
session = connect(socket_path=Path(sys.argv[1]))
lease = session.acquire("weights", "auto", Identity({"content": "abc", "dtype": "bf16"}), timeout_s=1)
lease.arena.allocate(1 << 20)
print("writing", flush=True)
time.sleep(1000)
"""


def test_next_waiter_writes_when_the_writer_is_killed(server):
    with subprocess.Popen([sys.executable, "-c", WRITE_AND_HANG, str(server.socket)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        reasons = []

        def kill_when_waiting(reason):
            reasons.append(reason)
            writer.kill()

        with server.connect() as session:
            lease = session.acquire("weights", "auto", MODEL, timeout_s=20, on_wait=kill_when_waiting)
            assert isinstance(lease, WriteLease)
            assert "is writing generation 1" in reasons[0]
            assert session.status().allocated_bytes == 0
            lease.release()


def test_exactly_one_of_many_writes_when_all_start_together(server):
    kinds, lock = [], threading.Lock()

    def engine():
        with server.connect() as session:
            lease = session.acquire("weights", "auto", MODEL, timeout_s=20)
            if isinstance(lease, WriteLease):
                offset = lease.arena.allocate(5)
                session.driver.write(lease.arena.address(offset), b"hello")
                kind, read = "write", lease.commit(b"", MODEL)
            else:
                kind, read = "read", lease
                lease.map()
            data = session.driver.read(read.arena.base, 5)
            read.release()
        with lock:
            kinds.append((kind, data))

    threads = [threading.Thread(target=engine) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kinds) == [("read", b"hello")] * 11 + [("write", b"hello")]


def test_reader_is_told_why_when_nothing_is_published_in_time(server):
    reasons = []
    with server.connect() as session:
        with pytest.raises(AcquireTimeout, match="nobody is writing"):
            session.acquire("weights", "ro", MODEL, timeout_s=0.05, on_wait=reasons.append)
        assert reasons == ["nothing is published yet and nobody is writing"]
        assert session.status().pools == ()


def test_fields_are_named_when_the_identity_differs(server):
    with server.connect() as writer, server.connect() as reader:
        lease = publish(writer, b"weights")
        with pytest.raises(IdentityMismatch, match="dtype: 'fp8' != 'bf16'"):
            reader.acquire("weights", "auto", Identity({"content": "abc", "dtype": "fp8"}), timeout_s=1)
        lease.release()


def test_old_generation_is_freed_when_its_last_reader_leaves(server):
    with server.connect() as first, server.connect() as second:
        old = publish(first, b"x" * PAGE)
        new = publish(second, b"y" * PAGE)
        assert second.status().allocated_bytes == 2 * PAGE
        assert first.driver.read(old.arena.base, 1) == b"x"
        old.release()
        assert second.status().allocated_bytes == PAGE
        assert new.layout.generation == 2
        new.release()


def test_many_descriptors_arrive_when_a_layout_has_hundreds_of_allocations(server):
    with server.connect() as writer, server.connect() as reader:
        lease = publish(writer, bytes(range(256)) * 16 * 600, slab=PAGE)
        assert len(lease.layout.allocations) == 600
        other = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        assert read_all(reader, other, 600 * PAGE) == bytes(range(256)) * 16 * 600
        other.release()
        lease.release()


def test_session_stays_in_step_when_taking_fails_amid_hundreds_of_allocations(server):
    with server.connect() as writer, server.connect() as reader:
        lease = publish(writer, b"x" * 600 * PAGE, slab=PAGE)
        other = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        taken = []

        def fail_at_the_second_batch(received):
            taken.append(len(received))
            if len(taken) == 2:
                raise MemoryError

        with pytest.raises(MemoryError):
            reader.receive_allocations(Export("weights"), fail_at_the_second_batch)
        assert taken == [253, 253]
        assert reader.status().allocations == 600
        assert read_all(reader, other, 1) == b"x"
        other.release()
        lease.release()


def test_memory_waits_when_another_process_is_about_to_release(runtime_dir):
    with running_server(runtime_dir, host_memory=64 * PAGE) as server, server.connect() as first, server.connect() as second:
        holding = first.acquire("a", "rw", MODEL, timeout_s=1, slab_bytes=PAGE)
        holding.arena.reserve_exact(40 * PAGE)
        lease = second.acquire("b", "rw", MODEL, timeout_s=1, slab_bytes=PAGE, memory_timeout_s=20)
        releaser = threading.Timer(0.2, holding.release)
        releaser.start()
        lease.arena.reserve_exact(40 * PAGE)
        releaser.join()
        assert second.status().allocated_bytes == 40 * PAGE
        lease.release()


def test_nothing_is_lost_when_there_is_no_memory(runtime_dir):
    with running_server(runtime_dir, host_memory=64 * PAGE) as server, server.connect() as session:
        read = publish(session, b"weights", pool="a", slab=PAGE)
        lease = session.acquire("b", "rw", MODEL, timeout_s=1, slab_bytes=PAGE, memory_timeout_s=0)
        with pytest.raises(OutOfMemory):
            lease.arena.reserve_exact(64 * PAGE)
        assert session.status().allocated_bytes == PAGE
        lease.release()
        assert session.driver.read(read.arena.base, 7) == b"weights"
        read.release()


def test_size_is_refused_at_once_when_it_can_never_fit(runtime_dir):
    with running_server(runtime_dir, host_memory=64 * PAGE) as server, server.connect() as session:
        lease = session.acquire("a", "rw", MODEL, timeout_s=1, slab_bytes=65 * PAGE, memory_timeout_s=1000)
        with pytest.raises(AllocationTooLarge, match="can never fit"):
            lease.arena.allocate(65 * PAGE)
        lease.release()


def test_child_is_told_when_it_uses_the_session_of_its_parent(server):
    with server.connect() as session:
        pid = os.fork()
        if pid == 0:
            try:
                session.status()
            except ForkedSession:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert session.status().device == "host"


FORK_AND_DIE = """
import os, sys, time
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
session = connect(socket_path=Path(sys.argv[1]))
lease = session.acquire("weights", "rw", Identity({}), timeout_s=1)
if os.fork() == 0:
    time.sleep(2)
    os._exit(0)
os._exit(0)
"""


def test_lease_ends_with_its_process_when_a_forked_child_lives_on(server):
    subprocess.run([sys.executable, "-c", FORK_AND_DIE, str(server.socket)], check=True, close_fds=True, stdout=subprocess.DEVNULL)
    with server.connect() as session:
        lease = session.acquire("weights", "rw", MODEL, timeout_s=1)
        lease.release()


def test_session_and_its_lease_go_on_when_the_server_alone_dies(server):
    with server.connect() as session:
        lease = publish(session, b"weights")
        before = session.status()
        server.kill()
        after = session.status()
        assert after.pid != before.pid
        assert (after.pools, after.allocated_bytes, after.allocations) == (before.pools, before.allocated_bytes, before.allocations)
        assert session.driver.read(lease.arena.base, 7) == b"weights"
        lease.release()


def test_mapped_memory_stays_usable_when_the_server_dies_with_its_keeper(server):
    with server.connect() as session:
        lease = publish(session, b"weights")
        server.lose_everything()
        assert session.driver.read(lease.arena.base, 7) == b"weights"
        with pytest.raises(ConnectionLost):
            session.status()
        with pytest.raises(SessionClosed):
            session.status()
        lease.release()


def test_second_server_is_refused_when_one_runs(server):
    second = subprocess.run([sys.executable, "-c", SERVE, "host", str(server.directory), "0"], capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert "already owns" in second.stderr
    with server.connect() as session:
        assert session.status().device == "host"


def test_device_server_ends_when_its_supervisor_is_killed(server):
    pid = server.pid
    pidfd = os.pidfd_open(pid)
    server.supervisor.kill()
    server.supervisor.wait()
    import select

    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    assert server.keepers, "the next supervisor's server can go on"
    end_keeper(server.socket)
    server.supervisor.returncode = 0
