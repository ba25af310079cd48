"""A device server and clients to which all kinds of harm are done while they work: what clients are told fits together. `make restarts` does more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import KINDS, dealt, small_disk
from tests.chaos.history import Event, check
from tests.chaos.restarts import HOST_MEMORY, run
from tests.conftest import RunningServer, running_server

SEED = 5
KILLS = 4
WITHOUT_PRIVILEGE = KINDS.keys() - {"full disk"}


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[RunningServer]:
    """A device server with little memory."""
    with running_server(runtime_dir, host_memory=HOST_MEMORY) as running:
        yield running


@pytest.mark.timeout(300)
def test_history_of_all_clients_fits_together_when_every_kind_of_fault_hits_them(server: RunningServer, tmp_path: Path) -> None:
    kinds = dealt(random.Random(SEED), KILLS, len(WITHOUT_PRIVILEGE), disk=False)
    outcome = run(server, tmp_path, SEED, kinds, patience_s=5.0)
    assert outcome.findings == []
    assert outcome.kills >= KILLS
    assert outcome.faults == {"kill server": KILLS, **dict.fromkeys(WITHOUT_PRIVILEGE, 1)}
    assert {"read", "published", "held", "has", "looked", "asked wrongly"} <= outcome.counts.keys()


def test_same_faults_are_dealt_when_the_seed_is_the_same() -> None:
    first, again, other = (dealt(random.Random(seed), 5, 30, disk=True) for seed in (3, 3, 4))
    assert first == again != other
    assert first.count("kill server") == 5
    assert {kind: first.count(kind) >= 3 for kind in KINDS} == dict.fromkeys(KINDS, True)


def test_small_disk_is_gone_when_its_context_ends(tmp_path: Path) -> None:
    before = tmp_path.stat().st_dev
    with small_disk(tmp_path) as disk:
        assert disk is None or disk.stat().st_dev != before
    assert tmp_path.stat().st_dev == before


def event(kind: str, began: float, client: str = "one", **facts: object) -> Event:
    return {"client": client, "pid": hash(client), "kind": kind, "began": began, "ended": began + 0.5, **facts}


def has(what: str, number: int, began: float, client: str) -> Event:
    return event("has", began, client, what=what, number=number)


def leaves(what: str, began: float, client: str) -> Event:
    return event("leaves", began, client, what=what)


def published(generation: int, began: float, digest: str = "a") -> Event:
    return event("published", began, generation=generation, digest=digest)


def read(generation: int, began: float, digest: str = "a", said: str | None = None) -> Event:
    return event("read", began, generation=generation, digest=digest, said=said or digest)


def fault(name: str, began: float, ended: float, **facts: object) -> Event:
    return {**event("fault", began, "", fault=name, **facts), "ended": ended}


RIGHT = {
    "nothing": [],
    "published and read": [published(1, 1), read(1, 2)],
    "read while the next one is published": [published(1, 0), published(2, 1, "b"), read(1, 1.2)],
    "read by two, and its writer never heard of it": [read(1, 1), read(1, 2)],
    "one after the other writes": [has("generation", 1, 1, "a"), leaves("generation", 2, "a"), has("generation", 1, 3, "b")],
    "granted while the one before gives up": [has("generation", 1, 1, "a"), leaves("generation", 2, "a"), has("generation", 1, 1.8, "b")],
    "killed, and the next": [has("epoch", 1, 1, "a"), fault("kill client", 2, 4, pids=[hash("a")]), has("epoch", 2, 3, "b")],
    "cut, and the next": [has("generation", 1, 1, "a"), event("torn", 2, "a"), has("generation", 1, 2.2, "b"), event("lost", 3, "a")],
    "cut off by a journal that cannot be written": [
        has("generation", 1, 1, "a"),
        fault("journal limit", 2, 4),
        has("generation", 1, 3, "b"),
        event("lost", 3.8, "a"),
    ],
    "terms grow": [has("term", 1, 1, "a"), leaves("term", 2, "a"), has("term", 2, 3, "b")],
    "memory with what an earlier epoch has written": [
        event("held", 1, epoch=1, before=0, after=1),
        event("held", 2, epoch=2, before=1, after=2),
    ],
    "refused on a full disk": [fault("full disk", 1, 2), event("refused", 1.8, code="journal_unavailable")],
    "refused for want of memory": [fault("memory hog", 1, 2), event("refused", 0.8, code="out_of_memory")],
}

WRONG = {
    "a mixture": ([published(1, 1), read(1, 2, "b", said="a")], "was read as"),
    "another content than was published": ([published(1, 1), read(1, 2, "b")], "was read as"),
    "two contents of what nobody heard to be published": ([read(1, 1, "a"), read(1, 2, "b")], "was read as"),
    "one number for two generations": ([published(1, 1), published(1, 2, "b")], "twice"),
    "an acknowledged generation is lost": ([published(2, 1), read(1, 2)], "after 2 was acknowledged"),
    "a generation that was read is lost": ([read(2, 1), read(1, 2)], "after 2 was acknowledged"),
    "an older generation is published": ([published(2, 1), published(1, 2, "b")], "after 2 was acknowledged"),
    "two write": ([has("generation", 1, 1, "a"), has("generation", 1, 2, "b"), leaves("generation", 3, "a")], "while a had generation 1"),
    "two write different generations": ([has("generation", 1, 1, "a"), has("generation", 2, 2, "b"), leaves("generation", 3, "a")], "while a had"),
    "a third writes while the first still does": (
        [
            has("generation", 1, 1, "a"),
            leaves("generation", 9, "a"),
            has("generation", 2, 2, "b"),
            leaves("generation", 3, "b"),
            has("generation", 3, 4, "c"),
        ],
        "c was granted generation 3 while a had generation 1",
    ),
    "two hold one epoch": ([has("epoch", 1, 1, "a"), has("epoch", 1, 2, "b")], "epoch 1 was granted after 1"),
    "two hold": ([has("epoch", 1, 1, "a"), has("epoch", 2, 2, "b"), event("held", 3, "a", epoch=1, before=0, after=1)], "while a had epoch 1"),
    "held by the next before the kill": (
        [has("epoch", 1, 1, "a"), has("epoch", 2, 2, "b"), fault("kill client", 3, 4, pids=[hash("a")])],
        "while a had epoch 1",
    ),
    "held by the next while the kill was another's": (
        [has("epoch", 1, 1, "a"), fault("kill client", 1.6, 1.7, pids=[1]), has("epoch", 2, 2, "b"), leaves("epoch", 3, "a")],
        "while a had epoch 1",
    ),
    "an epoch that shrinks": ([has("epoch", 2, 1, "a"), leaves("epoch", 2, "a"), has("epoch", 1, 3, "b")], "epoch 1 was granted after 2"),
    "a term twice": ([has("term", 2, 1, "a"), leaves("term", 2, "a"), has("term", 2, 3, "b")], "term 2 was granted after 2"),
    "memory that another one writes to": ([event("held", 1, epoch=1, before=0, after=2)], "was written to by epoch 2"),
    "memory of a later epoch": ([event("held", 1, epoch=3, before=4, after=3)], "found what epoch 4"),
    "refused without a fault": ([fault("memory hog", 1, 2), event("refused", 3, code="out_of_memory")], "without a cause: out_of_memory"),
    "refused for another reason than the fault": (
        [fault("memory hog", 1, 2), event("refused", 1, code="journal_unavailable")],
        "without a cause: journal_unavailable",
    ),
    "refused for a reason that no fault has": ([fault("full disk", 1, 2), event("refused", 1, code="quota")], "without a cause: quota"),
    "a session that is lost": ([fault("kill server", 1, 2), event("lost", 1)], "lost its session without a cause"),
    "a session that is lost when another one's was cut": ([event("torn", 1, "a"), event("lost", 2, "b")], "b lost its session"),
}


@pytest.mark.parametrize("events", RIGHT.values(), ids=RIGHT.keys())
def test_checker_finds_nothing_when_a_history_can_be(events: list[Event]) -> None:
    assert check(events) == []


@pytest.mark.parametrize(("events", "finding"), WRONG.values(), ids=WRONG.keys())
def test_checker_finds_what_cannot_be(events: list[Event], finding: str) -> None:
    assert any(finding in sentence for sentence in check(events)), check(events)
