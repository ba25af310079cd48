"""The published pool, against a simple model of its promises, and case by case."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from gms_core.errors import GenerationConflict, IdentityMismatch, LeaseConflict, ManifestError
from gms_core.layout import Allocation, Identity
from gms_core.server.effects import Free, Refuse, SessionId, Wait
from gms_core.server.published import GrantRead, GrantWrite, PublishedPool

A, B = Identity({"content": "a"}), Identity({"content": "b"})
ONE, TWO, THREE, FOUR = map(SessionId, (1, 2, 3, 4))


def publish(pool, session, identity, *ids):
    """Write and commit one generation of 8-byte allocations."""
    assert any(isinstance(effect, GrantWrite) for effect in pool.acquire(session, "rw", identity))
    pool.add(session, [(identifier, 8) for identifier in ids])
    return pool.commit(session, [Allocation(identifier, 8 * place, 8) for place, identifier in enumerate(ids)], b"", identity)


def test_first_auto_writes_and_others_read_when_it_commits():
    pool = PublishedPool("weights")
    assert pool.acquire(ONE, "auto", A) == [GrantWrite(ONE, 1)]
    assert isinstance(pool.acquire(TWO, "auto", A)[0], Wait)
    pool.add(ONE, [(1, 8)])
    effects = pool.commit(ONE, [Allocation(1, 0, 8)], b"m", A)
    assert [(type(effect), effect.session) for effect in effects] == [(GrantRead, ONE), (GrantRead, TWO)]
    assert pool.lease_of(ONE) == pool.lease_of(TWO) == "read"


def test_exactly_one_waiter_writes_when_the_writer_dies():
    pool = PublishedPool("weights")
    pool.acquire(ONE, "auto", A)
    pool.acquire(TWO, "auto", A)
    pool.acquire(THREE, "auto", A)
    pool.add(ONE, [(1, 8)])
    effects = pool.release(ONE)
    assert effects[0] == Free((1,))
    assert [effect for effect in effects if isinstance(effect, GrantWrite)] == [GrantWrite(TWO, 1)]
    assert pool.lease_of(THREE) == ""


def test_readers_keep_their_generation_when_a_new_one_is_committed():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    publish(pool, TWO, B, 2)
    assert pool.allocations_of(ONE) == {1: 8}
    assert pool.allocations_of(TWO) == {2: 8}
    assert pool.release(ONE) == [Free((1,))]


def test_nothing_committed_is_freed_when_its_last_reader_leaves():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    assert pool.release(ONE) == []
    assert isinstance(pool.acquire(TWO, "ro", A)[0], GrantRead)


def test_committed_generation_is_untouched_when_a_writer_dies():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    pool.acquire(TWO, "rw", B)
    pool.add(TWO, [(2, 8)])
    assert pool.release(TWO) == [Free((2,))]
    assert pool.committed.generation == 1
    assert publish(pool, TWO, B, 3)[-1].layout.generation == 2


def test_reader_is_not_blocked_when_a_writer_waits_or_writes():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    pool.acquire(TWO, "rw", A)
    pool.acquire(THREE, "rw", A)
    assert isinstance(pool.acquire(FOUR, "ro", A)[0], GrantRead)


@given(st.lists(st.tuples(st.integers(10, 20), st.sampled_from(["rw", "replace", "leave"])), max_size=30))
def test_reader_is_never_made_to_wait_when_writers_crowd_a_committed_pool(crowd):
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    for reader, (session, action) in enumerate(crowd, start=100):
        with contextlib.suppress(LeaseConflict):
            if action == "leave":
                pool.release(SessionId(session))
            else:
                pool.acquire(SessionId(session), "rw", A, replace=1 if action == "replace" else None)
        assert GrantRead(SessionId(reader), pool.committed) in pool.acquire(SessionId(reader), "ro", A)


def test_fields_are_named_when_another_identity_is_published():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    (refusal,) = pool.acquire(TWO, "auto", B)
    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, IdentityMismatch)
    assert set(refusal.error.details) == {"content"}


def test_reader_waits_for_the_writer_when_the_old_generation_is_of_another_identity():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    pool.acquire(TWO, "rw", B)
    assert isinstance(pool.acquire(THREE, "ro", B)[0], Wait)
    pool.add(TWO, [(2, 8)])
    effects = pool.commit(TWO, [Allocation(2, 0, 8)], b"", B)
    assert any(isinstance(effect, GrantRead) and effect.session == THREE for effect in effects)


def test_replacing_drops_the_old_generation_first_when_nobody_reads_it():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    assert isinstance(pool.acquire(TWO, "rw", B, replace=1)[0], Wait)
    assert pool.release(ONE) == [Free((1,)), GrantWrite(TWO, 2)]


def test_replacing_is_refused_when_the_generation_is_another():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    (refusal,) = pool.acquire(TWO, "rw", B, replace=7)
    assert isinstance(refusal.error, GenerationConflict)
    assert pool.committed.generation == 1


def test_replacing_is_refused_when_the_generation_is_not_there_yet():
    """A rollback could take its number, and what nobody meant to replace would go."""
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    pool.acquire(TWO, "rw", B)
    (refusal,) = pool.acquire(THREE, "rw", B, replace=2)
    assert isinstance(refusal.error, GenerationConflict)
    assert isinstance(pool.acquire(FOUR, "rw", B, replace=1)[0], Wait)
    pool.add(TWO, [(2, 8)])
    (refusal,) = [effect for effect in pool.commit(TWO, [Allocation(2, 0, 8)], b"", B) if isinstance(effect, Refuse)]
    assert (refusal.session, type(refusal.error)) == (FOUR, GenerationConflict)


def test_request_is_withdrawn_with_its_reason_when_its_time_is_over():
    pool = PublishedPool("weights")
    pool.acquire(ONE, "ro", A)
    (refusal,) = pool.withdraw(ONE, 2.0)
    assert "nobody is writing" in str(refusal.error)
    assert pool.withdraw(ONE, 2.0) == []


@pytest.mark.parametrize(
    ("allocations", "error"),
    [([Allocation(9, 0, 8)], LeaseConflict), ([Allocation(1, 0, 16)], LeaseConflict), ([Allocation(1, 0, 8), Allocation(2, 4, 8)], ManifestError)],
)
def test_commit_changes_nothing_when_it_is_refused(allocations, error):
    pool = PublishedPool("weights")
    pool.acquire(ONE, "rw", A)
    pool.add(ONE, [(1, 8), (2, 8)])
    with pytest.raises(error):
        pool.commit(ONE, allocations, b"", A)
    assert pool.lease_of(ONE) == "write"
    assert pool.allocations_of(ONE) == {1: 8, 2: 8}


def test_unnamed_allocations_are_freed_when_the_draft_is_committed():
    pool = PublishedPool("weights")
    pool.acquire(ONE, "rw", A)
    pool.add(ONE, [(1, 8), (2, 8)])
    assert pool.commit(ONE, [Allocation(2, 0, 8)], b"", A)[0] == Free((1,))


def test_second_request_is_refused_when_the_session_has_a_lease():
    pool = PublishedPool("weights")
    publish(pool, ONE, A, 1)
    with pytest.raises(LeaseConflict):
        pool.acquire(ONE, "rw", A)


class PoolAgainstModel(RuleBasedStateMachine):
    """Random histories: what the server would do with the effects must keep every promise of the pool."""

    sessions = Bundle("sessions")

    def __init__(self):
        super().__init__()
        self.pool = PublishedPool("weights")
        self.alive: dict[int, int] = {}
        self.holding: dict[int, tuple[int, ...]] = {}
        self.waiting: set[int] = set()
        self.writer: int | None = None
        self.generations: list[int] = []
        self.identities: dict[int, Identity] = {}
        self.numbers = iter(range(1, 10**6))

    def carry_out(self, effects):
        for effect in effects:
            match effect:
                case Free(ids):
                    for identifier in ids:
                        del self.alive[identifier]  # a KeyError is a double free
                case GrantWrite(session, _):
                    assert self.writer is None
                    self.writer = session
                    self.waiting.discard(session)
                case GrantRead(session, layout):
                    assert not self.identities[session].differences(layout.identity)
                    self.holding[session] = tuple(allocation.id for allocation in layout.allocations)
                    self.waiting.discard(session)
                case Wait(session, reason):
                    assert reason
                case Refuse(session, _):
                    self.waiting.discard(session)

    @rule(target=sessions, count=st.integers(1, 3))
    def connect(self, count):
        return multiple(*(SessionId(next(self.numbers)) for _ in range(count)))

    @rule(session=sessions, mode=st.sampled_from(["auto", "rw", "ro"]), identity=st.sampled_from([A, B]), replace=st.sampled_from([None, None, 1, 2]))
    def acquire(self, session, mode, identity, replace):
        if session == self.writer or session in self.holding or session in self.waiting:
            with pytest.raises(LeaseConflict):
                self.pool.acquire(session, mode, identity, replace)
            return
        self.waiting.add(session)
        self.identities[session] = identity
        self.carry_out(self.pool.acquire(session, mode, identity, replace if mode == "rw" else None))

    @rule(session=sessions)
    def allocate(self, session):
        identifier = next(self.numbers)
        if session == self.writer:
            self.pool.add(session, [(identifier, 8)])
            self.alive[identifier] = 8
        else:
            with pytest.raises(LeaseConflict):
                self.pool.add(session, [(identifier, 8)])

    @rule(session=sessions, drop=st.booleans())
    def commit(self, session, drop):
        if session != self.writer:
            with pytest.raises(LeaseConflict):
                self.pool.commit(session, [], b"", A)
            return
        ids = list(self.pool.allocations_of(session))[drop:]
        self.writer = None
        effects = self.pool.commit(session, [Allocation(i, 8 * n, 8) for n, i in enumerate(ids)], b"", self.identities[session])
        self.carry_out(effects)
        assert self.holding[session] == tuple(ids)
        self.generations.append(self.pool.committed.generation)

    @rule(session=sessions)
    def leave(self, session):
        self.holding.pop(session, None)
        self.waiting.discard(session)
        if session == self.writer:
            self.writer = None
        self.carry_out(self.pool.release(session))

    @rule(session=sessions)
    def run_out_of_time(self, session):
        effects = self.pool.withdraw(session, 1.0)
        assert bool(effects) == (session in self.waiting)
        self.carry_out(effects)

    @invariant()
    def what_anyone_holds_is_alive(self):
        for ids in self.holding.values():
            assert all(identifier in self.alive for identifier in ids)
        if self.pool.committed:
            assert all(allocation.id in self.alive for allocation in self.pool.committed.allocations)

    @invariant()
    def nothing_leaks(self):
        kept = {i for ids in self.holding.values() for i in ids}
        kept |= {allocation.id for allocation in self.pool.committed.allocations} if self.pool.committed else set()
        kept |= set(self.pool.draft.sizes) if self.pool.draft else set()
        assert kept == set(self.alive)

    @invariant()
    def generations_only_grow(self):
        assert self.generations == sorted(set(self.generations))

    @invariant()
    def somebody_writes_when_anybody_could(self):
        if self.writer is None and self.pool.committed is None:
            assert not any(waiter.mode == "auto" for waiter in self.pool.queue)


PoolAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
