"""Engines of several ranks that ask for leases at once, on real servers: all ranks of one write or all read, and none waits for ever."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from gms_core.client import ReadLease, WriteLease, connect
from gms_core.engine_config import GmsConfig
from gms_core.errors import AcquireTimeout, GmsError, IdentityMismatch
from gms_core.layout import Identity
from gms_core.weights import group_lease
from gms_core.weights.leases import acquire
from tests.unit.rank_threads import Group
from tests.unit.server_threads import server_in_thread

MODEL = Identity({"content": "bytes"})
RANKS = 3
MIB = 2**20


@pytest.fixture
def servers(runtime_dir):
    """The sockets of one server for each rank."""
    with contextlib.ExitStack() as stack:
        directories = [runtime_dir / str(number) for number in range(RANKS)]
        for directory in directories:
            directory.mkdir(mode=0o700)
        yield [stack.enter_context(server_in_thread(directory, memory_bytes=512 * MIB)) for directory in directories]


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.setattr(group_lease, "TURN_S", 0.05)


class On:
    """A session with a server of another name: all servers of the tests serve `host`."""

    def __init__(self, session, device):
        self._session, self.device = session, device

    def __getattr__(self, name):
        return getattr(self._session, name)


class Engine:
    """Several ranks. What is done with it is done by all of them, each in a thread of its own."""

    def __init__(self, servers, name, devices=None, identities=(MODEL,) * RANKS):
        self._stack = contextlib.ExitStack()
        self.name, self.identities, self._group = name, identities, Group(len(servers))
        self._threads = self._stack.enter_context(ThreadPoolExecutor(len(servers)))
        sessions = [self._stack.enter_context(connect(socket_path=path, client=f"{name} rank {rank}")) for rank, path in enumerate(servers)]
        self.sessions = [On(session, devices[rank]) if devices else session for rank, session in enumerate(sessions)]
        self.leases = []

    def asks(self, mode="auto", timeout_s=30.0):
        def ask(rank):
            options = GmsConfig(mode=mode, acquire_timeout_s=timeout_s)
            try:
                return acquire(self.sessions[rank], "weights", self.identities[rank], options, lambda: self._group.rank(rank)).lease
            except GmsError as error:
                return error

        self.leases = list(self._threads.map(ask, range(len(self.sessions))))
        return self.leases

    def starts(self, *, dies=False, load_s=0.0):
        """Ask, and publish what is to be published; returns what it has attached to or published: a generation for each rank."""
        self.asks()
        assert not [lease for lease in self.leases if isinstance(lease, GmsError)], self.leases
        assert len({type(lease) for lease in self.leases}) == 1, self.leases
        time.sleep(load_s)
        for rank, lease in enumerate(self.leases):
            if isinstance(lease, WriteLease):
                if dies and rank:  # after it has published for the first rank
                    lease.release()
                    continue
                lease.arena.allocate(4096)
                lease.trim()
                self.leases[rank] = lease.commit(b"", MODEL)
        return [lease.layout.generation for lease in self.leases if isinstance(lease, ReadLease)]

    def close(self):
        for lease in self.leases:
            if not isinstance(lease, GmsError):
                lease.release()
        self._stack.close()


@pytest.fixture
def engine(servers):
    with contextlib.ExitStack() as stack:
        yield lambda name="engine", **options: stack.enter_context(contextlib.closing(Engine(servers, name, **options)))


def publish(path, identity=MODEL, size=4096):
    with connect(socket_path=path) as session:
        lease = session.acquire("weights", "rw", identity, timeout_s=5)
        lease.arena.allocate(size)
        lease.trim()
        lease.commit(b"", identity).release()


def generations(servers):
    found = []
    for path in servers:
        with connect(socket_path=path) as session:
            found += [tuple(one.generation for pool in session.status().pools for one in pool.generations)]
    return found


def together(*steps):
    with ThreadPoolExecutor(len(steps)) as threads:
        return [done.result(60) for done in [threads.submit(step) for step in steps]]


def test_one_engine_publishes_and_the_others_attach_when_all_start_at_once(engine, turns):
    engines = [engine(f"engine-{number}") for number in range(4)]
    assert together(*(one.starts for one in engines)) == [[1] * RANKS] * 4


def test_one_engine_publishes_when_all_find_at_once_that_a_server_has_nothing(engine, servers, turns):
    publish(servers[0])
    publish(servers[1])
    together(*(engine(f"engine-{number}").starts for number in range(4)))
    assert [status(path).pools[0].generation for path in servers] == [2, 2, 1]


@pytest.mark.parametrize("seed", range(6))
def test_no_engine_waits_for_ever_when_engines_die_while_they_publish_and_servers_lose_everything(servers, turns, seed):
    chance = random.Random(seed)
    plans = [[(chance.random() < 0.3, chance.random() * 0.05) for _ in range(4)] for _ in range(3)]

    def lives(number):
        for dies, load_s in plans[number]:
            one = Engine(servers, f"engine-{number}")
            try:
                one.starts(dies=dies, load_s=load_s)
            finally:
                one.close()

    together(*(lambda number=number: lives(number) for number in range(len(plans))))


def test_engines_do_not_wait_for_each_other_when_they_count_the_same_devices_differently(servers, turns):
    names = ["GPU-a", "GPU-b", "GPU-c"]
    with contextlib.closing(Engine(servers, "a", names)) as one, contextlib.closing(Engine(servers[::-1], "b", names[::-1])) as other:
        assert together(one.starts, other.starts) == [[1] * RANKS] * 2


def test_all_ranks_are_refused_at_once_and_told_by_whom_when_one_is(engine, servers, turns):
    with connect(socket_path=servers[1], client="somebody") as other, other.acquire("weights", "rw", MODEL, timeout_s=5):
        publish(servers[2], Identity({"content": "other"}))
        start = time.monotonic()
        first, second, third = engine().asks(timeout_s=50)
        assert time.monotonic() - start < 25
    assert isinstance(third, IdentityMismatch)
    assert str(third).startswith("pool 'weights' holds generation 1 of something else")
    for error in (first, second):
        assert isinstance(error, IdentityMismatch)
        assert "rank 2 of this engine (host) was not granted a lease: pool 'weights' holds generation 1 of something else" in str(error)
    assert not any(pool.writer for path in (servers[0], servers[2]) for pool in status(path).pools)


def status(path):
    with connect(socket_path=path) as session:
        return session.status()


def test_rank_says_for_whom_it_waits_and_all_stop_when_that_takes_too_long(engine, servers, turns, caplog):
    caplog.set_level(logging.INFO)
    with connect(socket_path=servers[1], client="somebody") as other, other.acquire("weights", "rw", MODEL, timeout_s=5):
        first, second, _ = engine().asks(timeout_s=0.3)
    assert isinstance(second, AcquireTimeout)
    assert "not granted within 0.3 s in all: " in str(second)
    assert "the writer is somebody (pid " in str(second)
    assert isinstance(first, AcquireTimeout)
    assert "rank 1 of this engine (host) was not granted a lease: not granted within" in str(first)
    assert "the writer is somebody (pid " in caplog.text


def test_rank_waits_for_a_writer_when_it_publishes_in_time(engine, servers, turns):
    publish(servers[0])
    publish(servers[2])
    one = engine()
    with connect(socket_path=servers[1]) as other:
        lease = other.acquire("weights", "rw", MODEL, timeout_s=5)

        def finish():
            time.sleep(0.3)
            lease.arena.allocate(4096)
            lease.commit(b"", MODEL).release()

        assert together(one.asks, finish)[0] == one.leases
    assert all(isinstance(lease, ReadLease) for lease in one.leases)


def test_what_nobody_reads_makes_room_when_both_would_not_fit(engine, servers, turns):
    publish(servers[0], size=320 * MIB)
    publish(servers[1])
    one = engine()
    assert all(isinstance(lease, WriteLease) for lease in one.asks())
    assert generations(servers) == [(), (1,), ()]


def test_what_is_read_stays_when_both_would_not_fit(engine, servers, turns):
    publish(servers[0], size=320 * MIB)
    with connect(socket_path=servers[0]) as reader, reader.acquire("weights", "ro", MODEL, timeout_s=5):
        assert all(isinstance(lease, WriteLease) for lease in engine().asks())
        assert generations(servers) == [(1,), (), ()]


def test_ranks_look_again_when_what_they_find_is_just_being_replaced(engine, servers, monkeypatch):
    publish(servers[0], Identity({"content": "newer"}))
    for path in servers[1:]:
        publish(path, Identity({"content": "older"}))
    guard, left = threading.Lock(), list(servers[1:])

    def others_publish(seconds):
        with guard:
            while left:
                publish(left.pop(), Identity({"content": "newer"}))

    monkeypatch.setattr(group_lease, "time", SimpleNamespace(monotonic=time.monotonic, sleep=others_publish))
    leases = engine(identities=(Identity({"content": ""}),) * RANKS).asks(mode="ro")
    assert [lease.layout.identity.fields["content"] for lease in leases] == ["newer"] * RANKS


def test_all_ranks_stop_in_time_when_what_they_find_is_replaced_again_and_again(engine, servers, monkeypatch):
    for number, path in enumerate(servers):
        publish(path, Identity({"content": f"checkpoint {number}"}))
    guard, count, until = threading.Lock(), iter(range(10_000)), time.monotonic() + 10

    def others_publish(seconds):
        time.sleep(0.05)
        if time.monotonic() < until:  # ends the test where nothing else does
            with guard:
                publish(servers[0], Identity({"content": f"newer checkpoint {next(count)}"}))

    monkeypatch.setattr(group_lease, "time", SimpleNamespace(monotonic=time.monotonic, sleep=others_publish))
    answers = engine(identities=(Identity({"content": ""}),) * RANKS).asks(mode="ro", timeout_s=1)
    assert [type(answer) for answer in answers] == [AcquireTimeout] * RANKS, answers
    assert "published again and again" in str(answers[0])
