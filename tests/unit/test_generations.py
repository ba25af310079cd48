"""Generations of a published pool: what keeps them and what frees them, against a simple model of their promises, and case by case."""

import copy

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gms_core.errors import AcquireTimeout, GenerationConflict, GenerationNotFound, GmsError, IdentityMismatch, InvalidArgument, LeaseConflict
from gms_core.layout import Allocation, Identity, Layout
from gms_core.server.effects import Free, Refuse, SessionId, Wait
from gms_core.server.grants import GrantRead, GrantWrite, News
from gms_core.server.published import PublishedPool
from gms_core.server.records import PublishedRecord

A, B = Identity({"content": "a"}), Identity({"content": "b"})
ONE, TWO, THREE, FOUR = map(SessionId, (1, 2, 3, 4))


def publish(pool, session, identity, *ids, pin=False):
    """Write and commit one generation of 8-byte allocations."""
    assert any(isinstance(effect, GrantWrite) for effect in pool.acquire(session, "rw", identity, renumbers=True))
    pool.add(session, [(identifier, 8) for identifier in ids])
    return pool.commit(session, [Allocation(identifier, 8 * place, 8) for place, identifier in enumerate(ids)], b"", identity, pin=pin)


def two_generations(pin=True):
    """A pool with a pinned generation 1 and a committed generation 2, which nobody reads."""
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1, pin=pin)
    pool.release(ONE)
    publish(pool, TWO, A, 2)
    pool.release(TWO)
    return pool


def test_pinned_generation_is_kept_without_readers_until_it_is_unpinned():
    pool = two_generations()
    assert set(pool.generations.all()) == {1, 2}
    assert pool.unpin(1) == [Free((1,))]
    with pytest.raises(GenerationNotFound, match="no generation 1"):
        pool.unpin(1)


def test_unpinned_generation_is_freed_by_its_last_reader():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1, pin=True)
    publish(pool, TWO, A, 2)
    assert pool.unpin(1) == []
    assert pool.release(ONE) == [Free((1,))]


def test_committed_generation_stays_when_it_is_unpinned():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1, pin=True)
    pool.release(ONE)
    assert pool.unpin(1) == []
    assert pool.committed.generation == 1


def test_replacing_waits_when_the_generation_is_pinned():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1, pin=True)
    pool.release(ONE)
    assert pool.acquire(TWO, "rw", B, replace=1) == [Wait(TWO, "generation 1 is pinned")]
    assert pool.unpin(1) == [Free((1,)), GrantWrite(TWO, 2)]


def test_who_waits_hears_of_a_pin_that_is_in_its_way():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    assert pool.acquire(TWO, "rw", B, replace=1) == [Wait(TWO, "generation 1 is still read by sessions 1")]
    assert pool.pin(1) == []
    assert pool.release(ONE) == [Wait(TWO, "generation 1 is pinned")]


def test_rollback_is_a_new_generation_of_the_same_memory():
    pool = two_generations()
    before = pool.generations.get(1)
    assert pool.rollback(THREE, 1, expected=2) == [Free((2,))]
    committed = pool.committed
    assert (committed.generation, committed.digest, committed.allocations) == (3, before.digest, before.allocations)
    assert pool.generations.retired_bytes == 0, "what the committed generation has too is not counted twice"
    assert pool.unpin(1) == [], "the committed generation has the memory"
    assert publish(pool, ONE, B, 4)[0] == Free((1,))


def test_memory_of_a_rollback_stays_when_the_generation_that_it_came_from_is_pinned():
    pool = two_generations()
    pool.rollback(THREE, 1, expected=2)
    effects = publish(pool, ONE, B, 4)
    assert not any(isinstance(effect, Free) for effect in effects)
    assert set(pool.generations.all()) == {1, 4}
    assert pool.unpin(1) == [Free((1,))]


@pytest.mark.parametrize(("to", "expected", "error"), [(1, 1, GenerationConflict), (7, 2, GenerationNotFound), (2, 2, InvalidArgument)])
def test_rollback_changes_nothing_when_it_is_refused(to, expected, error):
    pool = two_generations()
    before = pool.record()
    with pytest.raises(error):
        pool.rollback(THREE, to, expected)
    assert pool.record() == before


def test_draft_gets_a_later_number_when_a_rollback_takes_its_own():
    pool = two_generations()
    assert pool.acquire(ONE, "rw", B, renumbers=True) == [GrantWrite(ONE, 3)]
    pool.rollback(THREE, 1, expected=2)
    assert pool.committed.generation == 3
    pool.add(ONE, [(4, 8)])
    assert pool.commit(ONE, [Allocation(4, 0, 8)], b"", B)[-1].layout.generation == 4


def test_rollback_is_refused_when_the_writer_cannot_be_given_another_number():
    pool = two_generations()
    pool.acquire(ONE, "rw", B)
    with pytest.raises(LeaseConflict, match="too old"):
        pool.rollback(THREE, 1, expected=2)


def test_readers_who_wait_are_granted_what_a_rollback_brings_back():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1, pin=True)
    publish(pool, TWO, B, 2)
    pool.acquire(FOUR, "rw", B, renumbers=True)
    assert isinstance(pool.acquire(THREE, "ro", A)[0], Wait)
    assert any(isinstance(effect, GrantRead) and effect.session == THREE for effect in pool.rollback(SessionId(5), 1, expected=2))


def test_dropping_is_refused_with_the_readers_names():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    pool.acquire(TWO, "ro", A)
    with pytest.raises(LeaseConflict) as refusal:
        pool.drop(1)
    assert refusal.value.details == {"sessions": "1, 2"}


def test_dropping_is_refused_when_the_generation_is_pinned():
    pool = two_generations()
    with pytest.raises(LeaseConflict, match="pinned"):
        pool.drop(1)


def test_dropped_generation_is_freed_and_the_next_one_gets_a_later_number():
    pool = two_generations()
    assert pool.drop(2) == [Free((2,))]
    assert pool.committed is None
    assert pool.rollback(THREE, 1, expected=0) == []
    assert pool.committed.generation == 3


def test_next_auto_writes_when_the_committed_generation_is_dropped():
    pool = two_generations(pin=False)
    pool.drop(2)
    assert pool.acquire(THREE, "auto", A) == [GrantWrite(THREE, 3)]


def test_reader_has_both_generations_until_it_says_which_one_it_keeps():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    publish(pool, TWO, B, 2)
    assert pool.begin_move(ONE, B, 2).layout.generation == 2
    assert pool.allocations_of(ONE) == {1: 8}, "all of a lease is never of two generations"
    assert pool.exportable_to(ONE) == {1: 8, 2: 8}
    assert pool.end_move(ONE, 2) == [Free((1,))]
    assert pool.end_move(ONE, 2) == []
    assert pool.allocations_of(ONE) == {2: 8}


def test_generation_that_a_reader_moves_to_is_kept_for_it():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    publish(pool, TWO, A, 2)
    pool.release(TWO)
    pool.begin_move(ONE, A, 0)
    assert not any(isinstance(effect, Free) for effect in publish(pool, THREE, A, 3))
    assert pool.end_move(ONE, 1) == [Free((2,))]


def test_both_generations_are_free_when_a_reader_dies_while_it_moves():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    publish(pool, TWO, A, 2)
    pool.begin_move(ONE, A, 0)
    pool.release(TWO)
    publish(pool, THREE, A, 3)
    assert pool.release(ONE) == [Free((1, 2))]


@pytest.mark.parametrize(("identity", "generation", "error"), [(B, 0, IdentityMismatch), (A, 1, GenerationConflict)])
def test_moving_changes_nothing_when_it_is_refused(identity, generation, error):
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    publish(pool, TWO, A, 2)
    with pytest.raises(error):
        pool.begin_move(ONE, identity, generation)
    assert pool.generations.moving == {}


def test_who_waits_for_a_later_generation_is_told_of_it():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    assert isinstance(pool.watch(THREE, 1)[0], Wait)
    told = [effect for effect in publish(pool, TWO, B, 2) if isinstance(effect, News)]
    assert [(effect.session, effect.layout.generation) for effect in told] == [(THREE, 2)]
    assert pool.watch(THREE, 1) == told


def test_who_waits_for_a_later_generation_is_told_when_none_comes_in_time():
    pool = PublishedPool("weights")
    pool.watch(THREE, 0)
    (refusal,) = pool.withdraw(THREE, 1.0)
    assert isinstance(refusal.error, AcquireTimeout)
    assert pool.idle


def test_older_record_is_understood():
    record = msgspec.msgpack.encode({"generation": 4, "committed": 0, "retired": []})
    pool = PublishedPool.of("weights", msgspec.msgpack.decode(record, type=PublishedRecord), {})
    assert (pool.generations.last, pool.generations.pins, pool.rollbacks) == (4, set(), {})


SESSIONS = st.integers(1, 4).map(SessionId)
PICK = st.integers(0, 4)
"""Which of those that there are; 4 is for one that there is not."""


class GenerationsAgainstModel(RuleBasedStateMachine):
    """Random histories, in which the server is killed at any point: what it would do with the effects must keep every promise."""

    def __init__(self):
        super().__init__()
        self.pool = PublishedPool("weights")
        self.memory: set[int] = set()
        self.content: dict[int, tuple[int, ...]] = {}
        self.reading: dict[int, int] = {}
        self.moving: dict[int, int] = {}
        self.pins: set[int] = set()
        self.waiting: dict[int, Identity] = {}
        self.watching: dict[int, int] = {}
        self.writer: tuple[int, list[int]] | None = None
        self.committed = 0
        self.last = 0
        self.numbers = iter(range(1, 10**6))

    def carry_out(self, effects):
        for effect in effects:
            match effect:
                case Free(ids):
                    assert ids
                    assert len(set(ids)) == len(ids)
                    assert set(ids) <= self.memory, "freed twice"
                    self.memory -= set(ids)
                case GrantWrite(session, generation):
                    assert self.writer is None
                    assert generation == self.last + 1
                    self.writer = (session, [])
                    del self.waiting[session]
                case GrantRead(session, layout):
                    self.see(layout)
                    if session in self.waiting:
                        assert not self.waiting.pop(session).differences(layout.identity)
                    assert layout.generation == self.committed
                    self.reading[session] = layout.generation
                case News(session, layout):
                    self.see(layout)
                    assert layout.generation > self.watching.pop(session)
                case Refuse(session, _):
                    self.waiting.pop(session, None)
                    self.watching.pop(session, None)
                case Wait(session, reason):
                    assert session in self.waiting or session in self.watching
                    assert reason

    def one(self, pick):
        """A generation that is there, or one that is not."""
        there = sorted(self.pool.generations.all())
        return there[pick % len(there)] if there and pick < 4 else self.last - pick

    def reader(self, session):
        """That session, or one that reads, where it does not."""
        return min(self.reading, default=session) if session not in self.reading and session < 4 else session

    def see(self, layout):
        """A layout is of one generation, and always the same."""
        assert tuple(allocation.id for allocation in layout.allocations) == self.content[layout.generation], "a mixture"

    def refused(self, call, *errors):
        before = self.everything()
        with pytest.raises(errors or GmsError):
            call()
        assert self.everything() == before

    def everything(self):
        pool = self.pool
        generations = pool.generations
        waiting = [*pool.queue], dict(pool.watchers)
        return copy.deepcopy((pool.record(), dict(generations.readers), dict(generations.moving), generations.all(), waiting))

    def take_over_committed(self):
        """What a call may have changed of the committed generation."""
        now = self.pool.committed.generation if self.pool.committed else 0
        assert now in {0, self.committed} or now == self.last + 1
        self.committed = now
        self.last = max(self.last, now)

    @rule(session=SESSIONS, mode=st.sampled_from(["auto", "rw", "ro"]), identity=st.sampled_from([A, B]), replaces=st.booleans(), new=st.booleans())
    def acquire(self, session, mode, identity, replaces, new):
        busy = session in self.reading or session in self.waiting or (self.writer is not None and self.writer[0] == session)
        if busy or session in self.watching:
            if busy:
                self.refused(lambda: self.pool.acquire(session, mode, identity), LeaseConflict)
            return
        self.waiting[session] = identity
        effects = self.pool.acquire(session, mode, identity, self.committed if replaces and mode == "rw" else None, renumbers=new)
        self.take_over_committed()
        self.carry_out(effects)

    @rule(session=SESSIONS, count=st.integers(1, 2), pin=st.booleans(), stays=st.booleans())
    def publish(self, session, count, pin, stays):
        """All at once what otherwise takes several steps, since most of a pool's life begins with it."""
        if self.writer is None and session not in self.reading and session not in self.waiting and session not in self.watching:
            self.acquire(session, "rw", A if count == 1 else B, replaces=False, new=True)
            self.write_and_commit(count, drop=False, pin=pin)
            if not stays:
                self.leave(session)

    @rule(session=SESSIONS, ahead=st.integers(-1, 1))
    def watch(self, session, ahead):
        after = max(0, self.last + ahead)
        if session in self.watching:
            self.refused(lambda: self.pool.watch(session, after), LeaseConflict)
        elif session not in self.waiting:
            self.watching[session] = after
            self.carry_out(self.pool.watch(session, after))

    @rule(session=SESSIONS)
    def run_out_of_time(self, session):
        effects = self.pool.withdraw(session, 1.0)
        assert bool(effects) == (session in self.waiting or session in self.watching)
        self.carry_out(effects)

    @rule(count=st.integers(1, 3), drop=st.booleans(), pin=st.booleans())
    def write_and_commit(self, count, drop, pin):
        if self.writer is None:
            return
        session, _ = self.writer
        ids = [next(self.numbers) for _ in range(count)]
        self.memory.update(ids)
        self.pool.add(session, [(identifier, 8) for identifier in ids])
        kept = tuple(self.pool.allocations_of(session))[drop:]
        self.writer = None
        self.content[self.last + 1] = kept
        identity = A if count == 1 else B
        effects = self.pool.commit(session, [Allocation(i, 8 * n, 8) for n, i in enumerate(kept)], b"", identity, pin=pin)
        self.take_over_committed()
        assert self.committed == self.last
        if pin:
            self.pins.add(self.committed)
        self.carry_out(effects)
        assert self.reading[session] == self.committed

    @rule(count=st.integers(1, 2))
    def allocate(self, count):
        if self.writer is not None:
            ids = [next(self.numbers) for _ in range(count)]
            self.memory.update(ids)
            self.pool.add(self.writer[0], [(identifier, 8) for identifier in ids])

    @rule(session=SESSIONS, pick=PICK, wrong=st.sampled_from([False, False, False, True]))
    def rollback(self, session, pick, wrong):
        to, expected = self.one(pick), self.committed - wrong
        draft = self.pool.draft
        if wrong or to == self.committed or to not in self.pool.generations.all() or (draft is not None and not draft.renumbers):
            self.refused(lambda: self.pool.rollback(session, to, expected))
            return
        self.content[self.last + 1] = self.content[to]
        effects = self.pool.rollback(session, to, expected)
        self.take_over_committed()
        assert self.committed == self.last == self.pool.rollbacks[session].generation
        self.carry_out(effects)

    @rule(pick=PICK)
    def pin(self, pick):
        generation = self.one(pick)
        if generation not in self.pool.generations.all():
            self.refused(lambda: self.pool.pin(generation), GenerationNotFound)
            return
        self.pins.add(generation)
        self.carry_out(self.pool.pin(generation))

    @rule(pick=PICK)
    def unpin(self, pick):
        generation = self.one(pick)
        if generation not in self.pool.generations.all():
            self.refused(lambda: self.pool.unpin(generation), GenerationNotFound)
            return
        self.pins.discard(generation)
        effects = self.pool.unpin(generation)
        self.take_over_committed()
        self.carry_out(effects)

    @rule(pick=PICK)
    def drop(self, pick):
        generation = self.one(pick)
        kept = generation in self.pins or generation in {*self.reading.values(), *self.moving.values()}
        if kept or generation not in self.pool.generations.all():
            self.refused(lambda: self.pool.drop(generation), LeaseConflict, GenerationNotFound)
            return
        effects = self.pool.drop(generation)
        self.take_over_committed()
        self.carry_out(effects)

    @rule(session=SESSIONS, right=st.sampled_from([True, True, False]), names=st.booleans())
    def begin_move(self, session, right, names):
        session, committed = self.reader(session), self.pool.committed
        identity = A if committed is None else committed.identity if right else B if committed.identity == A else A
        if session not in self.reading or session in self.moving or committed is None or identity.differences(committed.identity):
            self.refused(lambda: self.pool.begin_move(session, identity, self.committed if names else 0))
            return
        self.see(self.pool.begin_move(session, identity, self.committed if names else 0).layout)
        if self.reading[session] != self.committed:
            self.moving[session] = self.committed

    @rule(session=SESSIONS, forward=st.booleans())
    def end_move(self, session, forward):
        session = self.reader(session)
        if session not in self.reading:
            self.refused(lambda: self.pool.end_move(session, self.committed), LeaseConflict)
            return
        kept = self.moving.get(session, self.reading[session]) if forward else self.reading[session]
        self.reading[session] = kept
        self.moving.pop(session, None)
        effects = self.pool.end_move(session, kept)
        self.take_over_committed()
        self.carry_out(effects)

    @rule(session=SESSIONS)
    def leave(self, session):
        for had in (self.reading, self.moving, self.waiting, self.watching):
            had.pop(session, None)
        if self.writer is not None and self.writer[0] == session:
            self.writer = None
        effects = self.pool.release(session)
        self.take_over_committed()
        self.carry_out(effects)

    @rule(lost=st.integers(0, 3))
    def be_killed(self, lost):
        """Another server takes over from the record; some sessions do not come back, and who waited asks again, or not."""
        record = msgspec.msgpack.decode(msgspec.msgpack.encode(self.pool.record()), type=PublishedRecord)
        written = {number: msgspec.msgpack.encode(self.pool.generations.get(one)) for number, one in record.written.items()}
        pool = PublishedPool.of("weights", record, {number: msgspec.msgpack.decode(one, type=Layout) for number, one in written.items()})
        assert pool.generations.all() == self.pool.generations.all()
        if record.draft is not None:
            pool.resume_draft(record.draft)
        for session, generation in self.reading.items():
            pool.resume_reader(session, generation, self.moving.get(session, 0))
        self.waiting.clear()
        self.watching.clear()
        assert pool.record() == self.pool.record()
        assert pool.drop_unread() == [], "what was there is kept by somebody"
        self.pool = pool
        for session in sorted(self.reading)[:lost]:
            self.leave(session)

    @invariant()
    def memory_is_that_of_what_is_kept_and_no_other(self):
        kept = {*self.reading.values(), *self.moving.values(), *self.pins, self.committed} - {0}
        assert set(self.pool.generations.all()) == kept
        ids = {identifier for generation in kept for identifier in self.content[generation]}
        ids |= set(self.pool.draft.sizes) if self.pool.draft else set()
        assert self.memory == ids

    @invariant()
    def nobody_reads_a_mixture(self):
        assert self.pool.readers == self.reading
        for session, generation in self.reading.items():
            assert tuple(self.pool.allocations_of(session)) == self.content[generation]
            both = {*self.content[generation], *self.content.get(self.moving.get(session, 0), ())}
            assert set(self.pool.exportable_to(session)) == both

    @invariant()
    def only_a_rollback_has_the_layout_of_another(self):
        generations = self.pool.generations
        assert generations.origins.keys() <= generations.all().keys()
        by_content = {}
        for generation in generations.all():
            by_content.setdefault(generations.origin(generation), set()).add(self.content[generation])
        assert all(len(contents) == 1 for contents in by_content.values())
        assert len({*by_content}) == len({self.content[generation] or generations.origin(generation) for generation in generations.all()})

    @invariant()
    def bytes_are_counted_once(self):
        committed = set(self.content.get(self.committed, ()))
        drafted = set(self.pool.draft.sizes) if self.pool.draft else set()
        assert self.pool.generations.retired_bytes == 8 * len(self.memory - committed - drafted)

    @invariant()
    def nobody_waits_for_what_is_there(self):
        assert all(after >= self.committed for after in self.watching.values())
        assert self.pool.watchers == self.watching
        if self.writer is None and self.committed == 0:
            assert not any(waiter.mode == "auto" for waiter in self.pool.queue)


GenerationsAgainstModel.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestGenerationsAgainstModel = GenerationsAgainstModel.TestCase
