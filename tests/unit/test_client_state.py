"""The state in which a failed or broken-off call leaves sessions, leases and arenas."""

import os
import signal
import threading

import pytest

from gms_core.client import ReadLease, WriteLease
from gms_core.errors import ConnectionLost, DriverError, ForkedSession, InvalidArgument, QuotaExceeded, ServerUnavailable, SessionClosed
from gms_core.layout import Identity
from gms_core.vmm.driver import Access
from gms_core.vmm.host import HostDriver

MODEL = Identity({"content": "abc"})
PAGE = 4096


class FaultyDriver(HostDriver):
    """Real memory, of which one call fails when the test says so.

    Attributes:
        faults: Which of the next calls of a name fails, counted from 1.
    """

    def __init__(self):
        super().__init__()
        self.faults = {}

    def _fail_if_told(self, call):
        self.faults = {name: left - (name == call) for name, left in self.faults.items()}
        if self.faults.get(call) == 0:
            raise DriverError(f"{call} failed because the test wants it")

    def unmap(self, address, size):
        self._fail_if_told("unmap")
        super().unmap(address, size)

    def map(self, address, size, handle):
        self._fail_if_told("map")
        super().map(address, size, handle)

    def set_access(self, address, size, access):
        self._fail_if_told(f"set_access {access.value}")
        super().set_access(address, size, access)


@pytest.fixture
def faulty(server, monkeypatch):
    """A session whose driver fails on demand."""
    driver = FaultyDriver()
    monkeypatch.setattr("gms_core.client.session.open_driver", lambda _: driver)
    with server.connect() as session:
        yield session


def written(session, data=b"weights", slab=16 * PAGE):
    lease = session.acquire("weights", "rw", MODEL, timeout_s=10, slab_bytes=slab)
    assert isinstance(lease, WriteLease)
    session.driver.write(lease.arena.address(lease.arena.allocate(len(data))), data)
    return lease


class Waiting(threading.Thread):
    """A thread that waits for a lease, and keeps the error that ended the wait."""

    def __init__(self, session, timeout_s=60):
        super().__init__()
        self.session, self.timeout_s, self.error = session, timeout_s, None
        self.waits = threading.Event()
        self.start()
        assert self.waits.wait(10)

    def run(self):
        try:
            self.session.acquire("weights", "ro", MODEL, timeout_s=self.timeout_s, on_wait=lambda _: self.waits.set())
        except ConnectionLost as error:
            self.error = error


def test_session_is_closed_when_the_caller_breaks_a_wait_off(server):
    def break_off(_):
        raise SystemExit(3)

    with server.connect() as session:
        with pytest.raises(SystemExit):
            session.acquire("weights", "ro", MODEL, timeout_s=60, on_wait=break_off)
        with pytest.raises(SessionClosed):
            session.status()


def test_waiting_thread_is_released_when_another_closes_the_session(server):
    with server.connect() as observer:
        session = server.connect()
        waiting = Waiting(session)
        session.close()
        waiting.join(30)
        assert not waiting.is_alive()
        assert isinstance(waiting.error, ConnectionLost)
        while len(observer.status().sessions) > 1:
            pass
        assert observer.status().pools == ()


def test_child_is_told_when_it_was_forked_while_a_thread_waited(server):
    with server.connect() as session:
        waiting = Waiting(session)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            try:
                session.status()
            except ForkedSession:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        session.close()
        waiting.join(30)


def test_slab_is_refused_when_it_is_not_positive(server):
    with server.connect() as session, pytest.raises(InvalidArgument):
        session.acquire("weights", "rw", MODEL, timeout_s=1, slab_bytes=-PAGE)


def test_server_is_named_with_its_command_when_only_its_socket_is_left(server):
    path = server.socket
    os.link(path, path.with_name("kept"))
    server.stop()
    path.with_name("kept").rename(path)
    with pytest.raises(ServerUnavailable, match="gms serve --device host"):
        server.connect()


def test_draft_stays_writable_when_its_commit_is_refused(server, monkeypatch):
    with server.connect() as session:
        lease = written(session)

        def refuse(_):
            raise QuotaExceeded("because the test wants it")

        with monkeypatch.context() as patched:
            patched.setattr(session, "commit", refuse)
            with pytest.raises(QuotaExceeded):
                lease.commit(b"", MODEL)
        session.driver.write(lease.arena.base, b"WEIGHTS")
        read = lease.commit(b"", MODEL)
        assert session.driver.read(read.arena.base, 7) == b"WEIGHTS"
        read.release()


def test_interrupt_is_seen_when_it_comes_after_the_commit_was_carried_out(server, monkeypatch):
    with server.connect() as session:
        lease = written(session)
        commit = session.commit

        def commit_and_be_interrupted(request):
            commit(request)
            raise KeyboardInterrupt

        monkeypatch.setattr(session, "commit", commit_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt):
            lease.commit(b"", MODEL)
        lease.release()


def test_nothing_is_leased_or_mapped_when_what_was_committed_cannot_be_mapped_for_good(faulty, monkeypatch):
    lease = written(faulty)
    commit = faulty.commit

    def commit_then_fail(request):
        granted = commit(request)
        faulty.driver.faults["set_access read"] = 1
        return granted

    monkeypatch.setattr(faulty, "commit", commit_then_fail)
    with pytest.raises(DriverError, match="because the test wants it"):
        lease.commit(b"", MODEL)
    assert faulty.status().pools[0].readers == ()
    assert not lease.arena.mapped


def test_arena_is_consistent_when_an_unused_slab_cannot_be_unmapped(faulty):
    lease = written(faulty, slab=PAGE)
    lease.arena.reserve_exact(4 * PAGE)
    faulty.driver.faults["unmap"] = 2
    with pytest.raises(DriverError):
        lease.trim()
    assert lease.arena.length == sum(allocation.size for allocation in lease.arena.allocations)
    offset = lease.arena.allocate(4 * PAGE)
    faulty.driver.write(lease.arena.address(offset), b"x" * 4 * PAGE)
    lease.commit(b"", MODEL).release()


@pytest.mark.parametrize("fault", [("map", 1), ("map", 2), ("set_access read_write", 1), ("set_access read_write", 2)])
def test_last_slab_is_as_it_was_when_its_trimming_fails(faulty, fault):
    lease = written(faulty)
    faulty.driver.faults.update([fault])
    with pytest.raises(DriverError):
        lease.trim()
    assert faulty.driver.read(lease.arena.base, 7) == b"weights"
    lease.arena.allocate(PAGE)
    read = lease.commit(b"", MODEL)
    assert faulty.status().allocated_bytes == read.layout.size == 2 * PAGE
    read.release()


def test_lease_is_kept_and_released_later_when_its_memory_cannot_be_unmapped(faulty):
    written(faulty).commit(b"", MODEL).release()
    lease = faulty.acquire("weights", "ro", MODEL, timeout_s=1)
    assert isinstance(lease, ReadLease)
    lease.map()
    faulty.driver.faults["unmap"] = 1
    with pytest.raises(DriverError):
        lease.release()
    assert faulty.status().pools[0].readers == (faulty.welcome.session,)
    lease.release()
    assert faulty.status().pools[0].readers == ()


@pytest.mark.parametrize("fault", ["map", "set_access read"])
def test_memory_can_be_remapped_when_the_first_try_fails(faulty, fault):
    lease = written(faulty).commit(b"", MODEL)
    lease.unmap()
    faulty.driver.faults[fault] = 1
    with pytest.raises(DriverError):
        lease.remap()
    assert not lease.arena.mapped
    lease.remap()
    assert faulty.driver.read(lease.arena.base, 7) == b"weights"
    with pytest.raises(DriverError):
        faulty.driver.set_access(lease.arena.base, PAGE, Access.READ_WRITE)
    lease.release()
