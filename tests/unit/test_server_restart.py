"""A device server that is killed at any moment: memory, leases, grants and numbers are with the next one, and clients go on as if nothing were."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_core.client import ReadLease, WriteLease, connect
from gms_core.errors import ConnectionLost, IdentityMismatch
from gms_core.layout import Identity
from gms_core.runtime_dir import keeper_path
from tests.conftest import SERVE, RunningServer, running_server
from tests.unit.engine_processes import Refused, processes
from tests.unit.publishing import MODEL, PAGE, publish, read_all

READ_AND_HOLD = """
import sys
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
session = connect(socket_path=Path(sys.argv[1]), client="holder")
lease = session.acquire("weights", "ro", Identity({"content": "abc", "dtype": "bf16"}), timeout_s=10)
lease.map()
print("reads", flush=True)
for line in sys.stdin:
    print(session.driver.read(lease.arena.base, 5).decode(), flush=True)
"""


@pytest.fixture
def start() -> Iterator:
    with processes() as begin:
        yield begin


def kill(server: RunningServer) -> None:
    """Kill the device server, and wait until there is another one."""
    os.kill(server.pid, signal.SIGKILL)
    server.wait_until_ready()


def until(condition, patience_s: float = 30.0):
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def facts(server: RunningServer) -> tuple:
    """What must be the same before and after."""
    with server.connect("facts") as session:
        report = session.status()
    pools = [(pool.name, pool.generation, pool.digest, pool.bytes, pool.readers, pool.draft_bytes, pool.retired_bytes) for pool in report.pools]
    retained = [(pool.name, pool.epoch, pool.state, pool.bytes, pool.holder, pool.users) for pool in report.retained]
    locks = [(lock.name, lock.term, lock.owner) for lock in report.locks]
    return pools, retained, locks, report.allocated_bytes, report.allocations


def test_published_memory_and_its_readers_are_there_when_the_server_was_killed(server: RunningServer) -> None:
    data = os.urandom(40 * PAGE + 5)
    with server.connect() as writer, server.connect() as reader:
        published = publish(writer, data)
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        assert read_all(reader, lease, len(data)) == data
        before = facts(server)
        for _ in range(3):
            kill(server)
            assert facts(server) == before
            assert reader.driver.read(lease.arena.base, len(data)) == data
            with server.connect() as late:
                other = late.acquire("weights", "ro", MODEL, timeout_s=1)
                assert read_all(late, other, len(data)) == data
                other.release()
        lease.unmap()
        lease.remap()
        assert reader.driver.read(lease.arena.base, len(data)) == data
        lease.release()
        published.release()
        with pytest.raises(IdentityMismatch):
            reader.acquire("weights", "ro", Identity({"content": "other"}), timeout_s=1)


def test_writer_goes_on_where_it_was_and_readers_of_the_old_generation_keep_theirs(server: RunningServer) -> None:
    with server.connect() as first, server.connect() as second, server.connect() as third:
        old = publish(first, b"old")
        draft = second.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=4 * PAGE)
        assert isinstance(draft, WriteLease)
        parts = [os.urandom(6 * PAGE) for _ in range(4)]
        for part in parts:
            offset = draft.arena.allocate(len(part))
            second.driver.write(draft.arena.address(offset), part)
            kill(server)
        new = draft.commit(b"manifest", MODEL)
        assert new.layout.generation == 2
        kill(server)
        lease = third.acquire("weights", "ro", MODEL, timeout_s=1)
        assert isinstance(lease, ReadLease)
        assert read_all(third, lease, 24 * PAGE) == b"".join(parts)
        assert first.driver.read(old.arena.base, 3) == b"old"
        assert third.status().pools[0].retired_bytes == PAGE
        old.release()
        assert third.status().pools[0].retired_bytes == 0
        kill(server)
        until(lambda: third.status().allocated_bytes == 24 * PAGE)
        new.release()
        lease.release()


def test_request_that_waits_is_answered_by_the_next_server(server: RunningServer) -> None:
    with server.connect() as writer, server.connect() as waiting:
        draft = writer.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=4 * PAGE)
        granted: list = []
        thread = threading.Thread(target=lambda: granted.append(waiting.acquire("weights", "auto", MODEL, timeout_s=60)))
        thread.start()
        until(lambda: writer.status().pools[0].waiting)
        for _ in range(2):
            kill(server)
            until(lambda: writer.status().pools[0].waiting)
        draft.arena.allocate(PAGE)
        published = draft.commit(b"", MODEL)
        thread.join(30)
        assert isinstance(granted[0], ReadLease)
        granted[0].release()
        published.release()


def test_session_that_only_holds_a_lease_comes_back_by_itself(server: RunningServer) -> None:
    with server.connect() as writer:
        publish(writer, b"bytes").release()
    holder = subprocess.Popen([sys.executable, "-c", READ_AND_HOLD, str(server.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "reads\n"
        kill(server)
        with server.connect() as session:
            until(lambda: [one.client for one in session.status().sessions if one.leases] == ["holder"])
            number = next(one.id for one in session.status().sessions if one.leases)
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "bytes\n"
            holder.kill()
            until(lambda: number not in [one.id for one in session.status().sessions])
    finally:
        holder.kill()
        holder.communicate()


def test_process_that_dies_while_there_is_no_server_loses_its_lease(server: RunningServer) -> None:
    with server.connect() as writer:
        publish(writer, b"bytes").release()
    holder = subprocess.Popen([sys.executable, "-c", READ_AND_HOLD, str(server.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "reads\n"
    os.kill(holder.pid, signal.SIGSTOP)
    os.kill(server.pid, signal.SIGKILL)
    holder.kill()
    holder.communicate()
    server.wait_until_ready()
    with server.connect() as session:
        assert [one.client for one in session.status().sessions if one.leases] == []


def test_holder_holds_on_and_the_next_epoch_is_granted_when_it_is_gone(server: RunningServer, start) -> None:
    first, second = start(server.socket, "one"), start(server.socket, "two")
    assert first.ask("plan", "kv", "a") is None
    first.ask("provide", "plan", [4 * PAGE, 2 * PAGE])
    assert first.ask("hold", 5.0) == 1
    first.ask("write", 7)
    assert second.ask("plan", "kv", "a") == ["plan", 6 * PAGE, 1]
    before = facts(server)
    kill(server)
    assert facts(server) == before
    second.tell("hold", 60.0)
    kill(server)
    with server.connect() as session:
        until(lambda: session.status().retained[0].waiting)
    assert not select.select([second._process.stdout], [], [], 0.3)[0], "two engines hold the memory"
    first.kill()
    assert second.answer() == 2
    assert second.ask("read") == [7]


def test_death_of_the_holder_while_there_is_no_server_is_noticed(server: RunningServer, start) -> None:
    first, sibling, second = start(server.socket, "one"), start(server.socket, "one", "rank 1"), start(server.socket, "two")
    first.ask("plan", "kv", "a")
    first.ask("provide", "plan", [PAGE])
    assert first.ask("hold", 5.0) == 1
    second.ask("plan", "kv", "a")
    second.tell("hold", 60.0)
    os.kill(server.pid, signal.SIGKILL)
    first.kill()
    first.wait()
    server.wait_until_ready()
    assert second.answer() == 2
    assert sibling.wait() == -signal.SIGKILL, "what was left of the engine had to be ended first"


def test_lock_stays_with_its_owner_and_terms_grow(server: RunningServer, start) -> None:
    first, second = start(server.socket, "one"), start(server.socket, "two")
    assert first.ask("elect", "primary", 1.0) == 1
    second.tell("elect", "primary", 60.0)
    for _ in range(2):
        kill(server)
    assert not select.select([second._process.stdout], [], [], 0.3)[0]
    first.kill()
    assert second.answer() == 2


def test_cohort_that_was_being_ended_is_ended_by_the_next_server(server: RunningServer, start) -> None:
    first, sibling, second = start(server.socket, "one"), start(server.socket, "one", "rank 1"), start(server.socket, "two")
    first.ask("plan", "kv", "a")
    first.ask("provide", "plan", [PAGE])
    first.ask("hold", 5.0)
    second.ask("plan", "kv", "a")
    first.tell("close")  # a reason to end the cohort, which may be quicker than the answer
    os.kill(server.pid, signal.SIGKILL)
    server.wait_until_ready()
    assert second.ask("hold", 60.0) == 2
    assert [first.wait(), sibling.wait()] == [-signal.SIGKILL] * 2
    with pytest.raises(Refused, match="cannot be joined"):
        start(server.socket, "one", "rank 2").ask("beat")


def test_nothing_is_lost_when_the_keeper_is_killed_before_the_server(server: RunningServer) -> None:
    with server.connect() as session:
        lease = publish(session, b"bytes")
        before = facts(server)
        (killed,) = keepers(server)
        os.kill(killed, signal.SIGKILL)
        until(lambda: keepers(server) not in ([], [killed]))
        time.sleep(0.2)
        kill(server)
        assert facts(server) == before
        with server.connect() as late:
            other = late.acquire("weights", "ro", MODEL, timeout_s=1)
            assert read_all(late, other, 5) == b"bytes"
            other.release()
        lease.release()


def test_truth_is_told_and_numbers_go_on_when_everything_is_killed(server: RunningServer, start) -> None:
    engine = start(server.socket, "one")
    engine.ask("plan", "kv", "a")
    engine.ask("provide", "plan", [PAGE])
    assert engine.ask("hold", 5.0) == 1
    assert engine.ask("elect", "primary", 1.0) == 1
    with server.connect() as session:
        lease = publish(session, b"bytes")
        server.lose_everything()
        assert session.driver.read(lease.arena.base, 5) == b"bytes", "what is mapped stays"
        with pytest.raises(ConnectionLost):
            session.status()
        lease.release()
    engine.kill()
    engine.wait()
    pools, _, _, size, count = facts(server)
    assert (size, count) == (0, 0)
    assert [pool[:3] for pool in pools] == [("weights", 0, "")]
    with server.connect() as session:
        lease = publish(session, b"bytes")
        assert lease.layout.generation == 2
        lease.release()
    later = start(server.socket, "two")
    assert later.ask("plan", "kv", "a") is None
    later.ask("provide", "plan", [PAGE])
    assert later.ask("hold", 5.0) == 2
    assert later.ask("elect", "primary", 1.0) == 2


def test_clients_are_told_at_once_when_the_server_ends_for_good(runtime_dir: Path) -> None:
    with running_server(runtime_dir) as server, server.connect() as session:
        lease = publish(session, b"bytes")
        server.stop()
        began = time.monotonic()
        with pytest.raises(ConnectionLost):
            session.status()
        assert time.monotonic() - began < 5
        lease.release()
        assert [path.name for path in runtime_dir.iterdir()] == ["host.lock"]


def test_next_supervisor_goes_on_when_all_of_gms_serve_was_killed(server: RunningServer) -> None:
    with server.connect() as session:
        lease = publish(session, b"bytes")
        before = facts(server)
        device_server = os.pidfd_open(server.pid)
        server.supervisor.kill()
        server.supervisor.wait()
        select.select([device_server], [], [], 20)
        os.close(device_server)
        server.supervisor.stdout.close()
        server.supervisor = subprocess.Popen([sys.executable, "-c", SERVE, "host", str(server.directory), "0"], stdout=subprocess.PIPE, text=True)
        server.wait_until_ready()
        assert facts(server) == before
        lease.release()


def test_damaged_journal_is_put_aside_and_the_server_begins_anew(server: RunningServer) -> None:
    with server.connect() as session:
        lease = publish(session, b"bytes")
        path = server.socket.with_suffix(".journal")
        content = bytearray(path.read_bytes())
        content[20] ^= 0xFF
        path.write_bytes(content)
        kill(server)
        with pytest.raises(ConnectionLost):
            session.status()
        lease.release()
    assert facts(server)[3:] == (0, 0)
    assert path.with_suffix(".damaged").exists()


def test_stolen_token_is_of_no_use_to_another_process(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"bytes").release()
        token, number = session.welcome.token, session.welcome.session
        pid = session.status().pid
        os.kill(pid, signal.SIGSTOP)  # so that it does not see this session's end
    code = (
        "import sys; from pathlib import Path; from gms_core.client.dial import greet; from gms_core.protocol.messages import Hello;"
        "greet(Path(sys.argv[1]), Hello((2,), 'thief', '', sys.argv[2], int(sys.argv[3])), 10.0)"
    )
    os.kill(pid, signal.SIGKILL)
    server.wait_until_ready()
    done = subprocess.run([sys.executable, "-c", code, str(server.socket), token, str(number)], capture_output=True, text=True, check=False)
    assert "does not know session" in done.stderr


def keepers(server: RunningServer) -> list[int]:
    """Processes that listen as the server's keeper."""
    wanted = os.fsencode(keeper_path(server.socket))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, state = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if wanted in words and state != "Z":
                found.append(int(entry.name))
    return found


def test_old_client_and_new_server_understand_each_other(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from gms_core.client import session as module

    monkeypatch.setattr(module, "PROTOCOL_VERSIONS", (1,))
    with connect(socket_path=server.socket) as old:
        assert (old.welcome.version, old.welcome.token) == (1, "")
        lease = publish(old, b"bytes")
        kill(server)
        with pytest.raises(ConnectionLost):
            old.status()
        lease.release()
    assert facts(server)[0][0][1] == 1
