"""The event log, and what it says of pools: pure, so every history can be tried."""

from __future__ import annotations

import string
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import GmsError
from gms_core.events import Kind, sentence, text
from gms_core.layout import Allocation, Identity
from gms_core.server.effects import SessionId
from gms_core.server.event_log import EventLog
from gms_core.server.pool_changes import NEW, RetainedView, look_published, look_retained, published_changes, retained_changes, same_published
from gms_core.server.published import PublishedPool
from gms_core.server.retained import RetainedPool
from gms_core.server.seat import Claim

A = Identity({"model": "a"})
RARE, FREQUENT = Kind.POOL_COMMITTED, Kind.POOL_LEASE_GRANTED


def names_in(words: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(words) if name}


@given(st.lists(st.sampled_from([RARE, FREQUENT])), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.data())
def test_reader_sees_each_event_once_and_in_order_or_hears_how_many_it_lost(kinds, rare, frequent, most, data):
    log, seen, cursor, lost = EventLog(rare, frequent), [], 0, 0
    for kind in kinds:
        log.add(kind, "weights", {})
        for _ in range(data.draw(st.integers(0, 2))):
            events, cursor, gone = log.after(cursor, most)
            assert len(events) <= most
            seen += [event.number for event in events]
            lost += gone
    while log.last > cursor:
        events, cursor, gone = log.after(cursor, most)
        seen += [event.number for event in events]
        lost += gone
    assert seen == sorted(set(seen))
    assert len(seen) + lost == log.last == len(kinds) == sum(log.counts.values())
    assert log.after(cursor, most) == ([], cursor, 0)


def test_readers_of_weights_displace_no_commit_when_there_are_very_many():
    log = EventLog(rare=4, frequent=2)
    log.add(RARE, "weights", {"generation": 1})
    for _ in range(100):
        log.add(FREQUENT, "weights", {})
    events, last, lost = log.after(0, 512)
    assert [event.number for event in events] == [1, 100, 101]
    assert (last, lost) == (101, 98)


def test_event_has_both_clocks_and_its_facts_when_it_is_added():
    wall, monotonic = count(1000.0), count(5.0)
    log = EventLog(wall=lambda: next(wall), monotonic=lambda: next(monotonic))
    event = log.add(RARE, "weights", {"generation": 1})
    assert (event.number, event.time_s, event.monotonic_s, event.kind, event.subject, event.facts) == (
        1,
        1000.0,
        5.0,
        "pool_committed",
        "weights",
        {"generation": 1},
    )
    assert EventLog().name != log.name


@pytest.mark.parametrize("kind", Kind)
def test_kind_says_what_its_subject_is_and_what_happened(kind):
    assert kind.about in {"server", "pool", "engine", "lock", "session", "events"}
    facts = {name: 1.5 if name == "seconds" else "x" for name in names_in(kind.words)}
    said = text(kind, "it", facts)
    assert said.startswith(f"{kind.about} it: ")
    assert "{" not in said


@pytest.mark.parametrize(
    ("kind", "facts"), [("pool_unheard_of", {"a": 1, "b": "x"}), ("pool_committed", {"a": 1, "b": "x"}), ("engine_gone", {"a": 1, "b": "x"})]
)
def test_facts_are_shown_when_another_version_tells_what_this_one_does_not_know(kind, facts):
    assert sentence(kind, facts) == "a 1, b x"


class Replayed:
    """What the events alone say of a published pool."""

    def __init__(self):
        self.writer = None
        self.generations, self.pins, self.bytes = set(), set(), 0

    def hear(self, kind, facts):
        assert names_in(kind.words) - {"pid"} <= facts.keys()
        match kind:
            case Kind.POOL_DRAFT_BEGUN:
                assert self.writer is None
                self.writer = (facts["session"], facts["generation"])
            case Kind.POOL_DRAFT_DROPPED | Kind.POOL_COMMITTED:
                assert self.writer == (facts["session"], facts["generation"])
                self.writer = None
                if kind is Kind.POOL_COMMITTED:
                    self.generations.add(facts["generation"])
                    self.bytes += facts["bytes"]
            case Kind.POOL_DRAFT_RENUMBERED:
                assert self.writer == (facts["session"], facts["before"])
                self.writer = (facts["session"], facts["generation"])
            case Kind.POOL_ROLLED_BACK:
                assert facts["to"] in self.generations
                self.generations.add(facts["generation"])
            case Kind.POOL_PINNED:
                assert facts["generation"] in self.generations - self.pins
                self.pins.add(facts["generation"])
            case Kind.POOL_UNPINNED:
                self.pins.remove(facts["generation"])
            case Kind.POOL_GENERATION_FREED:
                self.generations.remove(facts["generation"])
                self.bytes -= facts["bytes"]


STEPS = ["rw", "ro", "auto", "replace", "add", "commit", "commit pinned", "publish", "release", "pin", "unpin", "rollback", "drop", "move"]


def take_step(pool, step, session, numbers):
    """What a session does next; which generation it means goes by its number."""
    there = sorted(pool.generations.all())
    chosen = there[session % len(there)] if there else 0
    match step:
        case "add":
            pool.add(session, [(next(numbers), 8)])
        case "commit" | "commit pinned":
            kept = [Allocation(i, 8 * n, 8) for n, i in enumerate(pool.draft.sizes if pool.draft else ())]
            pool.commit(session, kept, b"", A, pin=step == "commit pinned")
        case "release":
            pool.release(session)
        case "pin":
            pool.pin(chosen)
        case "unpin":
            pool.unpin(chosen)
        case "rollback":
            pool.rollback(session, chosen, pool.generations.current)
        case "drop":
            pool.drop(chosen)
        case "move":
            pool.begin_move(session, A, 0)
            pool.end_move(session, pool.generations.current)
        case _:
            replace = pool.generations.current if step == "replace" and pool.committed else None
            pool.acquire(session, "rw" if step == "replace" else step, A, replace, renumbers=True)


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 4)), max_size=40))
def test_events_alone_tell_who_writes_and_which_generations_there_are(steps):
    pool, told, seen, numbers = PublishedPool("weights"), Replayed(), NEW, count(1)
    for several, number in steps:
        session = SessionId(number)
        for step in ("release", "rw", "add", "commit", "release") if several == "publish" else (several,):
            try:
                take_step(pool, step, session, numbers)
            except GmsError:
                continue
            now = look_published(pool)
            assert same_published(pool, seen) == (list(published_changes(seen, now)) == [])
            for kind, facts in published_changes(seen, now, session):
                assert facts.get("session") == session or kind not in (Kind.POOL_PINNED, Kind.POOL_UNPINNED, Kind.POOL_ROLLED_BACK)
                told.hear(kind, facts)
            seen = now
            assert told.writer == ((pool.draft.session, pool.draft.generation) if pool.draft else None)
            layouts = pool.generations.all()
            assert told.generations == set(layouts)
            assert told.pins == pool.generations.pins
            sizes = {allocation.id: allocation.size for layout in layouts.values() for allocation in layout.allocations}
            assert told.bytes == sum(sizes.values()), "what several generations have is one memory"
            assert same_published(pool, now)
            assert list(published_changes(now, look_published(pool))) == []


def test_rollback_is_told_with_the_draft_that_it_moves_and_frees_no_more_than_there_was():
    pool, seen, told, numbers = PublishedPool("weights"), NEW, [], count(1)

    def after(*steps):
        nonlocal seen
        told.clear()
        for step, session in steps:
            take_step(pool, step, SessionId(session), numbers)
            now = look_published(pool)
            told.extend((kind.value, dict(facts)) for kind, facts in published_changes(seen, now, SessionId(session)))
            seen = now
        return told

    after(("rw", 1), ("add", 1), ("commit pinned", 1), ("release", 1), ("rw", 1), ("add", 1), ("commit", 1), ("release", 1))
    assert after(("rw", 3), ("rollback", 2)) == [
        ("pool_draft_begun", {"session": 3, "generation": 3}),
        ("pool_rolled_back", {"session": 2, "to": 1, "generation": 3, "bytes": 8}),
        ("pool_draft_renumbered", {"session": 3, "generation": 4, "before": 3}),
        ("pool_generation_freed", {"generation": 2, "bytes": 8}),
    ]
    assert after(("unpin", 4)) == [
        ("pool_unpinned", {"session": 4, "generation": 1}),
        ("pool_generation_freed", {"generation": 1, "bytes": 0}),
    ]
    assert after(("commit pinned", 3)) == [
        ("pool_committed", {"session": 3, "generation": 4, "bytes": 0, "allocations": 0}),
        ("pool_pinned", {"session": 3, "generation": 4}),
        ("pool_generation_freed", {"generation": 3, "bytes": 8}),
    ]


def test_retained_pool_tells_of_its_plan_its_holders_and_the_bridge():
    pool, seen, told = RetainedPool("kv"), RetainedView(), []

    def look():
        nonlocal seen
        now = look_retained(pool)
        told.extend((kind.value, facts.get("engine"), facts.get("epoch"), facts.get("part")) for kind, facts in retained_changes(seen, now))
        assert all(names_in(kind.words) <= facts.keys() for kind, facts in retained_changes(seen, now))
        seen = now

    one, two = Claim(SessionId(1), "c1", "engine-1"), Claim(SessionId(2), "c2", "engine-2")
    pool.ask_plan(one, A)
    look()
    pool.provide(SessionId(1), b"plan", [Allocation(1, 0, 8), Allocation(2, 8, 8)], [Allocation(3, 0, 8)])
    look()
    pool.hold(SessionId(1), first=False, bridge=True)
    look()
    pool.ask_plan(two, A)
    pool.hold(SessionId(2), first=False, bridge=True)
    look()
    pool.cohort_ends("c1", "it died")
    pool.cohort_mute("c1")
    look()
    pool.cohort_gone("c1")
    look()
    pool.release(SessionId(2))
    pool.session_ended(SessionId(1))
    pool.drop()
    look()
    assert told == [
        ("pool_planning", "engine-1", None, None),
        ("pool_planned", "engine-1", None, None),
        ("pool_epoch_granted", "engine-1", 1, "all"),
        ("pool_epoch_granted", "engine-2", 2, "the bridge"),
        ("pool_whole", "engine-2", 2, None),
        ("pool_dropped", None, None, None),
    ]
