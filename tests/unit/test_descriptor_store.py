"""`gms serve --keeper systemd`: systemd has the memory when every process of the service is killed, and decides what becomes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gms_core import config
from gms_core.cli.serve import take_over
from gms_core.client import Session, WriteLease, connect
from gms_core.devices import HOST, DeviceId
from gms_core.errors import ConnectionLost, InvalidArgument, KeeperLost, QuotaExceeded
from gms_core.keeper.connection import Keeper
from gms_core.protocol import peer
from gms_core.protocol.messages import HandOver
from gms_core.runtime_dir import keeper_path, socket_path
from gms_core.server.ownership import owned
from tests.conftest import keepers, owner, running_server
from tests.unit.publishing import MODEL, PAGE, publish, read_all
from tests.unit.service_manager_stand_in import StandIn, descendants
from tests.unit.stored_service import files as stored_files
from tests.unit.test_server_restart import until

GMS = [sys.executable, "-m", "gms_core.cli"]
Start = Callable[..., None]


@pytest.fixture
def systemd(runtime_dir: Path) -> Iterator[StandIn]:
    stand_in = StandIn(str(runtime_dir / "notify"), 64)
    try:
        yield stand_in
    finally:
        stand_in.close()


@pytest.fixture
def start(systemd: StandIn, runtime_dir: Path) -> Start:
    """Starts the service for the host device, and waits until it says that it is ready."""

    def begin(*arguments: str, keeper: str = "systemd", **environment: str) -> None:
        systemd.start([*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--keeper", keeper, *arguments], **environment)
        systemd.wait_until_told("READY=1")

    return begin


def session_of(directory: Path) -> Session:
    return connect(socket_path=directory / "host.sock", client="test")


def settled(systemd: StandIn, allocations: int) -> list[str]:
    """The names of what is kept once it has so many allocations: what a commit has made smaller is given up after its answer."""
    until(lambda: len(systemd.memory) == allocations)
    return systemd.names


def start_two(systemd: StandIn, directory: Path) -> None:
    """Start the service for the host and for a GPU whose server hangs, and wait until it says that it is ready."""
    script = """
import subprocess, sys
from pathlib import Path
from gms_core.server import supervisor
popen = subprocess.Popen
subprocess.Popen = lambda command, **options: popen(["sleep", "60"] if "GPU-1" in command else command, **options)
supervisor.serve(["GPU-1", "host"], Path(sys.argv[1]), None, lambda device, path: None, stored=True)
"""
    systemd.start([sys.executable, "-c", script, str(directory)])
    systemd.wait_until_told("READY=1")


def answers(path: Path) -> bool:
    """Whether the keeper at a path does."""
    try:
        Keeper(path, stored=True).close()
    except KeeperLost:
        return False
    return True


def facts(session: Session) -> tuple[object, ...]:
    report = session.status()
    return [(pool.name, pool.generation, pool.digest, pool.bytes, pool.readers) for pool in report.pools], report.allocated_bytes, report.allocations


def test_everything_is_adopted_when_the_supervisor_and_its_device_servers_are_killed_at_once(
    systemd: StandIn, start: Start, runtime_dir: Path
) -> None:
    data = os.urandom(40 * PAGE + 5)
    start()
    with session_of(runtime_dir) as writer, session_of(runtime_dir) as reader:
        published = publish(writer, data)
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        draft = reader.acquire("draft", "rw", MODEL, timeout_s=1, slab_bytes=4 * PAGE)
        assert isinstance(draft, WriteLease)
        before = facts(writer)
        for _ in range(3):
            systemd.kill()
            start()
            assert keepers(runtime_dir) == [], "no keeper process is needed"
            assert facts(writer) == before
            with session_of(runtime_dir) as late:
                other = late.acquire("weights", "ro", MODEL, timeout_s=1)
                assert read_all(late, other, len(data)) == data
                other.release()
            reader.driver.write(draft.arena.address(draft.arena.allocate(PAGE)), b"more")
            before = facts(writer)
        assert read_all(reader, lease, len(data)) == data
        lease.release()
        draft.commit(b"manifest", MODEL).release()
        published.release()
        assert systemd.dropped == 0


def test_supervisor_has_the_memory_when_its_device_server_alone_is_killed(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        before, kept = facts(session), settled(systemd, 1)
        for _ in range(2):
            os.kill(owner(runtime_dir / "host.sock"), signal.SIGKILL)
            assert facts(session) == before
        assert systemd.names == kept
        lease.release()


def test_device_server_connects_again_and_ends_nobody_when_its_connection_with_the_supervisor_is_lost(
    systemd: StandIn, start: Start, runtime_dir: Path
) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease, kept = publish(session, b"bytes"), settled(systemd, 1)
        with contextlib.closing(Keeper(keeper_path(runtime_dir / "host.sock"), stored=True)) as newcomer:
            assert newcomer.label
        other = publish(session, b"bytes", pool="other")
        assert set(kept) < set(settled(systemd, 2))
        assert session.status().allocations == 2
        assert keepers(runtime_dir) == []
        before = facts(session)
        systemd.kill()
        start()
        assert facts(session) == before
        other.release()
        lease.release()


def test_restart_of_the_unit_keeps_everything_and_its_stop_nothing_but_the_numbers(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease, driver = publish(session, b"bytes"), session.driver
        before = facts(session)
        systemd.restart_begins()
        assert systemd.told[-1] == "STOPPING=1"
        start()
        assert facts(session) == before
        systemd.stop()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="has ended"):
            session.status()
        assert time.monotonic() - began < 20, "nobody waits for a server that will not come"
        assert driver.read(lease.arena.base, 5) == b"bytes", "what is mapped stays"
        lease.release()
    start()
    assert systemd.memory == []
    with session_of(runtime_dir) as session:
        assert session.status().allocations == 0
        again = publish(session, b"bytes")
        assert again.layout.generation == 2
        again.release()


def test_freed_memory_leaves_the_store(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, os.urandom(40 * PAGE))
        first = systemd.memory
        assert first
        lease.release()
        publish(session, b"next").release()
        until(lambda: len(systemd.memory) == 1)
        assert set(systemd.memory).isdisjoint(first)
        systemd.kill()
        start()
        assert len(systemd.memory) == session.status().allocations == 1


def test_memory_is_refused_and_nothing_of_it_is_left_when_the_store_is_full(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    systemd.most = 5  # a socket and a label are among them
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, os.urandom(2 * PAGE), slab=PAGE)
        assert len(systemd.memory) == 2
        writer = session.acquire("other", "rw", MODEL, timeout_s=1, slab_bytes=PAGE)
        assert isinstance(writer, WriteLease)
        with pytest.raises(QuotaExceeded, match="no room for 2 more descriptors: it has 4 of 5") as caught:
            writer.arena.allocate(2 * PAGE)
        assert "FileDescriptorStoreMax" in caught.value.hint
        writer.arena.allocate(PAGE)
        assert (systemd.dropped, session.status().allocations, len(systemd.memory)) == (0, 3, 3)
        systemd.kill()
        start()
        with pytest.raises(QuotaExceeded):
            writer.arena.allocate(PAGE)
        lease.release()
        writer.release()
        assert systemd.dropped == 0


@pytest.mark.parametrize("lost", ["journal", "label"])
def test_store_that_is_not_of_this_journal_is_dropped_and_never_mapped(systemd: StandIn, start: Start, runtime_dir: Path, lost: str) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        systemd.kill()
        if lost == "journal":
            (runtime_dir / "host.journal").unlink()
        else:
            systemd._forget(lambda name: name == "host/label")
        start()
        assert systemd.memory == []
        assert sorted(systemd.names) == ["host/label", "host/socket"]
        with pytest.raises(ConnectionLost):
            session.status()
        lease.release()
    with session_of(runtime_dir) as session:
        assert session.status().allocations == 0
        publish(session, b"bytes").release()


def test_descriptors_with_names_that_nobody_gave_or_of_which_no_journal_tells_are_dropped(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        settled(systemd, 1)
        (memory,) = systemd.memory
        systemd.kill()
        strange = ["host/memory/x/1", "host/memory/1/1/1", "host/other", "stored", "stored", "host/memory/77/4096", "host/socket/ff", "/label"]
        systemd.store += [(name, os.memfd_create("strange")) for name in strange]
        start()
        assert sorted(systemd.names) == ["host/label", memory, "host/socket"]
        assert session.driver.read(lease.arena.base, 5) == b"bytes"
        lease.release()


def test_memory_that_is_there_twice_or_has_two_labels_is_dropped(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    for kind in ("memory", "label"):
        start()
        with session_of(runtime_dir) as session:
            lease = publish(session, b"bytes")
            systemd.kill()
            systemd.store.append((systemd.memory[0] if kind == "memory" else "host/label", os.memfd_create("another")))
            start()
            assert systemd.memory == []
            with pytest.raises(ConnectionLost):
                session.status()
            lease.release()
        systemd.stop()
        (runtime_dir / "host.journal").unlink()


def test_memory_of_a_keeper_process_moves_to_the_store_and_the_process_ends(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start(keeper="process")
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        before = facts(session)
        assert len(keepers(runtime_dir)) == 1
        assert systemd.names == []
        systemd.kill(but=keepers(runtime_dir))
        start()
        until(lambda: keepers(runtime_dir) == [])
        for _ in range(2):
            assert facts(session) == before
            assert len(systemd.memory) == session.status().allocations == 1
            systemd.kill()
            start()
        lease.release()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_keeper_process_loses_nothing_when_the_store_has_no_room_for_what_it_has(
    systemd: StandIn, start: Start, runtime_dir: Path, room: int
) -> None:
    start(keeper="process")
    with session_of(runtime_dir) as session:
        lease, before = publish(session, b"bytes"), facts(session)
        systemd.kill(but=keepers(runtime_dir))
        systemd.most = room or 1
        for _ in range(2):
            with pytest.raises(AssertionError, match="FDSTORE is not set" if not room else "no room for 2 more descriptors"):
                start(FDSTORE=str(room))
            systemd.service = None
        systemd.most = 64
        start()
        assert facts(session) == before
        lease.release()


def test_nothing_is_lost_and_nothing_more_is_taken_when_the_service_is_told_of_less_room_than_what_there_is_needs(
    systemd: StandIn, start: Start, runtime_dir: Path
) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        for pool in ("one", "two"):  # a server that is killed may not have seen yet that the writer of the last one has gone
            systemd.kill()
            start(FDSTORE="2")
            assert (session.status().allocations, session.driver.read(lease.arena.base, 5)) == (1, b"bytes")
            with session_of(runtime_dir) as other, pytest.raises(QuotaExceeded, match="it has 3 of 2"):
                publish(other, b"bytes", pool=pool)
        assert systemd.dropped == 0
        lease.release()


@pytest.mark.parametrize("lost", [1, 2])
def test_service_starts_without_its_memory_when_the_store_was_made_smaller_and_has_lost_the_label(
    systemd: StandIn, start: Start, runtime_dir: Path, lost: int
) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, os.urandom(4 * PAGE), slab=PAGE)
        assert len(systemd.names) == 6
        systemd.reload(6 - lost)
        assert "host/label" not in systemd.names
        systemd.kill()
        start()
        assert sorted(systemd.names) == ["host/label", "host/socket"]
        with pytest.raises(ConnectionLost):
            session.status()
        lease.release()
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        before = facts(session)
        systemd.kill()
        start()
        assert facts(session) == before
        lease.release()
    assert systemd.dropped == lost


def test_store_is_given_up_when_keepers_are_processes_again(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease = publish(session, b"bytes")
        systemd.kill()
        start(keeper="process")
        assert systemd.names == []
        with pytest.raises(ConnectionLost):
            session.status()
        lease.release()
    with session_of(runtime_dir) as session:
        assert session.status().allocations == 0


def test_server_whose_successor_systemd_starts_hands_nothing_over(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    replacing = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--replace"]
    refused = subprocess.run(replacing, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, "systemctl restart" in refused.stderr) == (2, True)
    for check in (True, False):  # none of several devices is handed over if one of them cannot be
        with pytest.raises(InvalidArgument, match="hands nothing over") as caught:
            take_over(HOST, runtime_dir, only_check=check)
        assert "systemctl restart" in caught.value.hint
    with session_of(runtime_dir) as session:
        with pytest.raises(InvalidArgument, match="systemd starts the next server"):
            session.perform(HandOver())  # as a client would that knows of no such servers
        publish(session, b"bytes").release()


def test_second_service_for_the_same_device_is_refused_and_takes_nothing_from_the_first(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        lease, before = publish(session, b"bytes"), settled(systemd, 1)
        other = StandIn(str(runtime_dir / "other"), 64)
        with contextlib.closing(other):
            second = other.start([*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--keeper", "systemd"])
            assert second.wait(30) != 0
            assert second.stderr is not None
            assert "already owns" in second.stderr.read()
            assert other.names == []
        os.kill(owner(runtime_dir / "host.sock"), signal.SIGKILL)
        assert session.driver.read(lease.arena.base, 5) == b"bytes"
        assert session.status().allocations == 1
        assert systemd.names == before
        lease.release()


@pytest.mark.parametrize("queue", ["empty", "full"])
def test_nobody_else_gets_a_device_whose_memory_systemd_has_while_the_service_is_down(
    systemd: StandIn, start: Start, runtime_dir: Path, queue: str
) -> None:
    start()
    with session_of(runtime_dir) as session, contextlib.ExitStack() as waiting:
        lease, before = publish(session, b"bytes"), facts(session)
        systemd.kill()
        if queue == "full":
            number = os.dup(dict(systemd.store)["host/socket"])
            waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=number)).listen(1)
            with contextlib.suppress(BlockingIOError):
                while True:
                    visitor = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                    peer.connect(visitor, keeper_path(runtime_dir / "host.sock"), 0.0)
        second = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir)]
        refused = subprocess.run(second, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode != 0
        assert "systemd has the memory of host" in refused.stderr
        assert "systemctl" in refused.stderr.partition("hint:")[2]
        assert keepers(runtime_dir) == []
        start()
        assert facts(session) == before
        lease.release()
    systemd.stop()
    with running_server(runtime_dir), session_of(runtime_dir) as session:
        publish(session, b"bytes").release()


def test_others_are_served_and_nothing_is_lost_when_the_old_server_of_one_device_still_lives(systemd: StandIn, runtime_dir: Path) -> None:
    path = socket_path(DeviceId("GPU-1"), runtime_dir)
    start_two(systemd, runtime_dir)
    with contextlib.closing(Keeper(keeper_path(path), stored=True)) as keeper, stored_files("memory/1/4096") as memory:
        keeper.set_label("ab")
        keeper.keep(memory)
    kept = sorted(systemd.names)
    systemd.kill()
    with owned(path):
        start_two(systemd, runtime_dir)
        with session_of(runtime_dir) as session:
            publish(session, b"bytes").release()
        assert set(kept) <= set(systemd.names)
    until(lambda: answers(keeper_path(path)))
    with contextlib.closing(Keeper(keeper_path(path), stored=True)) as keeper:
        assert (keeper.label, keeper.names()) == ("ab", ["memory/1/4096"])
    systemd.stop()


def test_device_is_served_once_there_is_room_when_others_have_filled_the_store(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    systemd.most = 4
    start()
    with session_of(runtime_dir) as session:
        draft = session.acquire("draft", "rw", MODEL, timeout_s=1, slab_bytes=PAGE)
        assert isinstance(draft, WriteLease)
        draft.arena.allocate(2 * PAGE)
        before = facts(session)
        systemd.kill()
        start_two(systemd, runtime_dir)
        assert facts(session) == before
        draft.release()
        until(lambda: answers(keeper_path(socket_path(DeviceId("GPU-1"), runtime_dir))))
    assert sorted(systemd.names) == ["GPU-1/label", "GPU-1/socket", "host/label", "host/socket"]
    assert systemd.dropped == 0
    systemd.stop()


def test_children_are_told_nothing_of_what_the_manager_has_told(systemd: StandIn, start: Start, runtime_dir: Path) -> None:
    start()
    with session_of(runtime_dir) as session:
        publish(session, b"bytes").release()
    systemd.kill()
    start()
    assert systemd.service is not None
    children = descendants(systemd.service.pid)
    assert children
    for pid in children:
        names = {word.partition(b"=")[0] for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
        assert names.isdisjoint({b"NOTIFY_SOCKET", b"FDSTORE", b"LISTEN_FDS", b"LISTEN_FDNAMES", b"LISTEN_PID"})


def test_abstract_address_is_understood(runtime_dir: Path) -> None:
    with contextlib.closing(StandIn(f"@gms-test-{os.getpid()}", 64)) as systemd:
        systemd.start([*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--keeper", "systemd"])
        systemd.wait_until_told("READY=1")
        assert len(systemd.names) == 2
        systemd.stop()


def test_readiness_is_told_with_keeper_processes_too(systemd: StandIn, start: Start) -> None:
    start(keeper="process")
    assert systemd.names == []
    systemd.stop()
    assert systemd.told == ["READY=1", "STOPPING=1"]


def test_readiness_is_told_later_when_systemd_could_not_be_reached_at_first(systemd: StandIn, runtime_dir: Path) -> None:
    notify, away = runtime_dir / "notify", runtime_dir / "away"
    notify.rename(away)
    service = systemd.start([*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir)])
    assert service.stderr is not None
    assert any("systemd cannot be told READY=1" in line for line in service.stderr)
    away.rename(notify)
    systemd.wait_until_told("READY=1")
    with session_of(runtime_dir) as session:
        publish(session, b"bytes").release()
    systemd.stop()


def test_readiness_is_told_when_one_of_two_devices_hangs(systemd: StandIn, runtime_dir: Path) -> None:
    script = """
import subprocess, sys
from pathlib import Path
from gms_core.server import supervisor
popen = subprocess.Popen
subprocess.Popen = lambda command, **options: popen(["sleep", "60"] if "GPU-1" in command else command, **options)
supervisor.serve(["GPU-1", "host"], Path(sys.argv[1]), None, lambda device, path: None)
"""
    systemd.start([sys.executable, "-c", script, str(runtime_dir)])
    systemd.wait_until_told("READY=1")
    systemd.stop()


@pytest.mark.parametrize(
    ("changes", "reason", "hint"),
    [
        ("NOTIFY_SOCKET=", "not known to be the main process", "ExecStart="),
        ("SYSTEMD_EXEC_PID=1", "not known to be the main process", "ExecStart="),
        ("SYSTEMD_EXEC_PID=", "not known to be the main process", "Before version 248"),
        ("FDSTORE=", "FDSTORE is not set", "FileDescriptorStoreMax="),
        ("FDSTORE=many", "FDSTORE is not set", "FileDescriptorStoreMax="),
    ],
)
def test_serve_is_refused_when_systemd_keeps_nothing_for_it(runtime_dir: Path, changes: str, reason: str, hint: str) -> None:
    environment = config.child_environment(NOTIFY_SOCKET=str(runtime_dir / "notify"), FDSTORE="64")
    started_as_main = ["sh", "-c", 'export SYSTEMD_EXEC_PID=$$; export "$0"; exec "$@"', changes]
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--keeper", "systemd"]
    refused = subprocess.run([*started_as_main, *command], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert refused.returncode == 2
    assert reason in refused.stderr
    assert hint in refused.stderr.partition("hint:")[2]
    assert list(runtime_dir.iterdir()) == []
