"""Locks in a real etcd, with real engines' processes on two "nodes" (a device server each), which are killed, frozen, and cut off from it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gms_core.errors import LockStoreUnavailable
from gms_core.failover.elector.address import parse
from gms_core.failover.elector.etcd import PREFIX, EtcdStore
from gms_core.failover.elector.store import Candidate, Owned, Taken
from tests.conftest import RunningServer, running_server
from tests.unit.etcd_clusters import Etcd, etcd_cluster, frozen
from tests.unit.failover_processes import ENGINE, Told, engine_options, told_processes

TTL_S = 3.0
KILLED = -signal.SIGKILL
Start = Callable[..., Told]
Store = Callable[[Etcd, str], EtcdStore]


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    with etcd_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def nodes(runtime_dir: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    with contextlib.ExitStack() as stack:
        directories = [runtime_dir / name for name in "ab"]
        for directory in directories:
            directory.mkdir(mode=0o700)
        first, second = (stack.enter_context(running_server(directory)) for directory in directories)
        yield first, second


@pytest.fixture
def start(nodes: tuple[RunningServer, RunningServer]) -> Iterator[Start]:
    with told_processes() as begin:
        yield lambda engine, node, lock, **options: begin(ENGINE, engine_options(engine, [nodes[node].socket], lock, **options))


def electors(engine: Told) -> list[int]:
    """The electors that an engine has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            if b"gms_core.failover.elector" in words and int(parent) == engine.pid:
                found.append(int(path.name))
    return found


def elected(engine: Told) -> int:
    """The term with which an engine serves, once it does."""
    term = engine.until(role="primary")["term"]
    engine.until(serves=True)
    return int(term)


def test_engine_of_another_node_serves_at_once_when_the_first_is_killed(etcd: Etcd, start: Start) -> None:
    lock = etcd.lock(ttl_s=60)  # nobody waits for it to run out
    first = start("engine-1", 0, lock)
    before = elected(first)
    second = start("engine-2", 1, lock)
    second.until(role="standby")
    first.kill()
    assert elected(second) > before


def test_second_waits_for_the_first_by_name(etcd: Etcd, start: Start) -> None:
    first = start("engine-1", 0, etcd.lock())
    elected(first)
    second = start("engine-2", 1, etcd.lock())
    second.until(role="standby")
    deadline = time.monotonic() + 20
    detail = ""
    while f"engine-1 (pid {first.pid} on " not in detail:
        assert time.monotonic() < deadline, detail
        second.tell("status")
        detail = second.until(status="standby")["detail"]
    first.tell("stop")
    first.until(departed=True)
    elected(second)


def test_primary_ends_before_another_node_is_elected_when_it_is_cut_off_from_etcd(etcd: Etcd, start: Start) -> None:
    first = start("engine-1", 0, etcd.lock())
    elected(first)
    second = start("engine-2", 1, etcd.lock())
    second.until(role="standby")
    with frozen([etcd.members[0].pid]):
        assert first.wait() == KILLED
        ended = time.monotonic()
        time.sleep(0.5)
        assert second.quiet() or not any(facts.get("role") == "promoting" for facts in second.heard)
    elected(second)
    assert time.monotonic() > ended


def test_primary_serves_on_when_etcd_is_restarted(etcd: Etcd, start: Start) -> None:
    first = start("engine-1", 0, etcd.lock(ttl_s=10))
    elected(first)
    etcd.members[0].end()
    etcd.members[0].start()
    etcd.await_healthy()
    time.sleep(4)
    first.tell("status")
    first.until(status="primary")


def test_primary_ends_when_its_key_is_deleted_by_hand(etcd: Etcd, start: Start) -> None:
    first = start("engine-1", 0, etcd.lock())
    elected(first)
    second = start("engine-2", 1, etcd.lock())
    second.until(role="standby")
    request = urllib.request.Request(
        f"http://127.0.0.1:{etcd.members[0].port}/v3/kv/deleterange",
        data=json.dumps({"key": b64encode(f"{PREFIX}llama".encode()).decode()}).encode(),
    )
    urllib.request.urlopen(request, timeout=5).close()
    assert first.wait() == KILLED
    elected(second)


def test_primary_finds_itself_ended_when_its_node_was_frozen_until_another_was_elected(
    etcd: Etcd, start: Start, nodes: tuple[RunningServer, RunningServer]
) -> None:
    first = start("engine-1", 0, etcd.lock())
    before = elected(first)
    second = start("engine-2", 1, etcd.lock())
    second.until(role="standby")
    (elector,) = electors(first)
    with frozen([first.pid, elector]):
        assert elected(second) > before
    assert first.wait() == KILLED


def test_primary_ends_when_its_elector_is_killed(etcd: Etcd, start: Start) -> None:
    first = start("engine-1", 0, etcd.lock())
    elected(first)
    second = start("engine-2", 1, etcd.lock())
    second.until(role="standby")
    (elector,) = electors(first)
    os.kill(elector, signal.SIGKILL)
    assert first.wait() == KILLED
    elected(second)


def test_primary_ends_before_another_is_elected_when_its_elector_is_stopped(etcd: Etcd, start: Start) -> None:
    first = start("engine-1", 0, etcd.lock())
    elected(first)
    second = start("engine-2", 1, etcd.lock())
    second.until(role="standby")
    (elector,) = electors(first)
    os.kill(elector, signal.SIGSTOP)
    try:
        assert first.wait() == KILLED
        assert not any(facts.get("role") == "promoting" for facts in second.heard)
        elected(second)
    finally:
        os.kill(elector, signal.SIGKILL)


def test_no_elector_is_left_when_engines_have_ended(etcd: Etcd, start: Start) -> None:
    first, second = start("engine-1", 0, etcd.lock()), start("engine-2", 1, etcd.lock())
    first.until(role="standby")
    second.until(role="standby")
    deadline = time.monotonic() + 20
    while not (running := electors(first) + electors(second)) or len(running) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()
    second.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in running):
        assert time.monotonic() < deadline + 20, running
        time.sleep(0.05)


def test_shadow_waits_and_says_why_when_etcd_does_not_answer(etcd: Etcd, start: Start) -> None:
    etcd.members[0].end()
    first = start("engine-1", 0, etcd.lock())
    first.until(role="standby")
    deadline = time.monotonic() + 20
    detail = ""
    while "etcd does not answer" not in detail:
        assert time.monotonic() < deadline, detail
        first.tell("status")
        detail = first.until(status="standby")["detail"]
    etcd.members[0].start()
    elected(first)


def test_primary_serves_on_when_the_leader_of_etcd_is_killed(tmp_path: Path, start: Start) -> None:
    with etcd_cluster(tmp_path, 3) as cluster:
        lock = cluster.lock(ttl_s=10)
        first = start("engine-1", 0, lock)
        before = elected(first)
        second = start("engine-2", 1, lock)
        second.until(role="standby")
        cluster.leader().end()
        time.sleep(6)
        first.tell("status")
        first.until(status="primary")
        first.kill()
        assert elected(second) > before


@pytest.fixture
def store() -> Iterator[Store]:
    with contextlib.ExitStack() as stack:
        yield lambda cluster, name: stack.enter_context(contextlib.closing(EtcdStore(parse(cluster.lock()), candidate(name))))
    gc.collect()  # a connection of urllib3's whose answer did not come in time is part of a cycle


def candidate(name: str) -> Candidate:
    return Candidate(name, f"cohort of {name}", 1, "host", f"token-of-{name}")


def test_lock_is_one_candidates_until_it_gives_it_back(etcd: Etcd, store: Store) -> None:
    first, second = store(etcd, "a"), store(etcd, "b")
    taken = first.take()
    assert isinstance(taken, Taken)
    assert first.take() == taken  # as after an answer that was lost
    assert second.take() == Owned("a (pid 1 on host)")
    assert first.renew()
    second.release()
    first.release()
    first.release()
    assert not first.renew()
    after = second.take()
    assert isinstance(after, Taken)
    assert after.term > taken.term


def test_nobody_knows_when_no_member_answers(etcd: Etcd, store: Store) -> None:
    first = store(etcd, "a")
    first.take()
    etcd.members[0].end()
    for question in (first.take, first.renew, first.release):
        with pytest.raises(LockStoreUnavailable, match=r"etcd does not answer: 127\.0\.0\.1:"):
            question()


def test_another_member_is_asked_when_one_is_gone(tmp_path: Path, store: Store) -> None:
    with etcd_cluster(tmp_path, 3) as cluster:
        first = store(cluster, "a")
        assert isinstance(first.take(), Taken)
        cluster.members[0].end()
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(LockStoreUnavailable):
                assert isinstance(first.take(), Taken)
                break
            assert time.monotonic() < deadline


def test_lock_is_somebodys_when_its_key_holds_something_else(etcd: Etcd, store: Store) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{etcd.members[0].port}/v3/kv/put",
        data=json.dumps({"key": b64encode(f"{PREFIX}llama".encode()).decode(), "value": b64encode(b"{").decode()}).encode(),
    )
    urllib.request.urlopen(request, timeout=5).close()
    outcome = store(etcd, "a").take()
    assert isinstance(outcome, Owned)
    assert "which is no engine" in outcome.owner
