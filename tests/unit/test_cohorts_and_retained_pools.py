"""The pure machines of fencing together, under any order of events: never two holders, never a grant before the proof, never a lost waiter."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gms_core.errors import CohortFenced, FenceFailed, GmsError, LeaseConflict
from gms_core.layout import Allocation, Identity
from gms_core.server.cohorts import Cohorts, Gone, Kill, Member, Mute
from gms_core.server.effects import Free, Refuse, Wait
from gms_core.server.retained import Adopt, MakePlan, RetainedPool, Whole
from gms_core.server.seat import Claim, Seat, Seated

KINDS = [Identity({"kind": "a"}), Identity({"kind": "b"})]


class Engines(RuleBasedStateMachine):
    """Sessions of a few cohorts do what they like; the test keeps its own books of what is true about their processes."""

    def __init__(self):
        super().__init__()
        self.cohorts = Cohorts()
        self.pool = RetainedPool("kv")
        self.lock = Seat("lock 'primary'")
        self.number = 0
        self.sessions = {}  # session -> cohort
        self.serving = set()
        self.connected = set()
        self.exited = set()
        self.killed = set()
        self.mapped = {"rest": {}, 0: {}, 1: {}}  # who writes to which part of the memory, until its process has exited or it has released
        self.epochs = []
        self.terms = []
        self.owner = None
        self.waiting = {}  # session -> what for
        self.memory = set()
        self.allocation = 0

    @initialize(crowded=st.booleans())
    def begin(self, crowded):
        if not crowded:
            return
        for number, name in enumerate(("one", "one", "two", "two", "three", "three"), start=1):
            self.join(name, serves=number % 2 == 0)
        self.waiting[1] = "plan"
        self.pool_effects(self.pool.ask_plan(self.claim(1), KINDS[0]))
        self.waiting[1] = "plan"
        self.allocation += 1
        self.pool_effects(self.pool.provide(1, b"plan", [Allocation(self.allocation, 0, 1)], [Allocation(-self.allocation, 0, 1)]))
        self.memory |= {self.allocation, -self.allocation}
        for session in (3, 5):
            self.waiting[session] = "plan"
            self.pool_effects(self.pool.ask_plan(self.claim(session), KINDS[0]))
        for session in (1, 3, 5):
            self.waiting[session] = "hold"
            self.pool_effects(self.pool.hold(session, first=False, bridge=True))

    def carry_out(self, effects):
        for effect in effects:
            if isinstance(effect, Kill):
                self.killed |= set(effect.members)
                self.pool_effects(self.pool.cohort_ends(effect.cohort, effect.reason))
                if self.lock.holder is not None and self.lock.holder.cohort == effect.cohort:
                    self.lock_effects(self.lock.end(effect.reason))
            elif isinstance(effect, Mute):
                assert all(session in self.exited for session in self.serving if self.sessions[session] == effect.cohort)
                self.pool_effects(self.pool.cohort_mute(effect.cohort))
            elif isinstance(effect, Gone):
                assert all(session in self.exited for session, cohort in self.sessions.items() if cohort == effect.cohort)
                self.pool_effects(self.pool.cohort_gone(effect.cohort))

    def pool_effects(self, effects):
        for effect in effects:
            if isinstance(effect, Free):
                assert not any(self.mapped.values()), "memory was freed that somebody maps"
                self.memory -= set(effect.ids)
                continue
            if isinstance(effect, Seated):
                self.map(effect.session, self.pool.turn)
                if not self.pool.unproven:
                    self.map(effect.session, "rest")
                assert not self.epochs or effect.number > self.epochs[-1]
                self.epochs.append(effect.number)
            if isinstance(effect, Whole):
                self.map(effect.session, "rest")
            if not isinstance(effect, Wait):
                assert self.waiting.pop(effect.session) in {"plan", "hold", "whole"}
                assert effect.session in self.connected

    def map(self, session, part):
        assert all(cohort == self.sessions[session] for cohort in self.mapped[part].values()), "two engines write to the same memory"
        self.mapped[part][session] = self.sessions[session]

    def unmap(self, session):
        # A process is one of several of its engine; what any of them may still do on a device ends when all have exited.
        cohort = self.sessions[session]
        if all(other in self.exited for other, its in self.sessions.items() if its == cohort):
            for part in self.mapped.values():
                for other in [other for other, its in part.items() if its == cohort]:
                    del part[other]

    def lock_effects(self, effects):
        for effect in effects:
            if isinstance(effect, Seated):
                assert self.owner is None or self.owner in self.exited, "two primaries"
                self.terms.append(effect.number)
                self.owner = effect.session
            if not isinstance(effect, Wait):
                assert self.waiting.pop(effect.session) == "lock"

    def claim(self, session):
        return Claim(session, self.sessions[session], self.sessions[session])

    def pick(self, data):
        free = sorted(session for session in self.connected if session not in self.waiting)
        return data.draw(st.sampled_from(free)) if free else None

    @rule(name=st.sampled_from(["one", "two", "three"]), serves=st.booleans())
    def join(self, name, serves=False):
        self.number += 1
        try:
            self.cohorts.join(name, name, Member(self.number, 1000 + self.number, "rank", 0.0, serves))
        except CohortFenced:
            return
        if serves:
            self.serving.add(self.number)
        self.sessions[self.number] = name
        self.connected.add(self.number)

    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def ask_plan(self, data, kind):
        session = self.pick(data)
        if session is None:
            return
        self.waiting[session] = "plan"
        try:
            self.cohorts.of(session)
            self.pool_effects(self.pool.ask_plan(self.claim(session), kind))
        except GmsError:
            self.waiting.pop(session, None)

    @rule(data=st.data(), bridge=st.booleans())
    def provide(self, data, bridge):
        session = self.pick(data)
        if session is None:
            return
        self.waiting[session] = "plan"
        self.allocation += 1
        try:
            spares = [Allocation(-self.allocation, 0, 1)] if bridge else []
            self.pool_effects(self.pool.provide(session, b"plan", [Allocation(self.allocation, 0, 1)], spares))
            self.memory |= {self.allocation, *(spare.id for spare in spares)}
        except LeaseConflict:
            del self.waiting[session]

    @rule(data=st.data())
    def await_whole(self, data):
        session = self.pick(data)
        if session is None:
            return
        self.waiting[session] = "whole"
        try:
            self.pool_effects(self.pool.await_whole(session))
        except LeaseConflict:
            del self.waiting[session]

    @rule(data=st.data(), first=st.booleans(), bridge=st.booleans())
    def hold(self, data, first, bridge):
        session = self.pick(data)
        if session is None:
            return
        self.waiting[session] = "hold"
        try:
            self.cohorts.of(session)
            self.pool_effects(self.pool.hold(session, first=first, bridge=bridge))
        except GmsError:
            self.waiting.pop(session, None)

    @rule(data=st.data(), first=st.booleans())
    def elect(self, data, first):
        session = self.pick(data)
        if session is None:
            return
        self.waiting[session] = "lock"
        try:
            self.cohorts.of(session)
            self.lock_effects(self.lock.claim(self.claim(session), first=first))
        except GmsError:
            self.waiting.pop(session, None)

    @rule(data=st.data())
    def time_is_over(self, data):
        if not self.waiting:
            return
        session = data.draw(st.sampled_from(sorted(self.waiting)))
        if self.waiting[session] == "lock":
            self.lock_effects(self.lock.withdraw(session, 1.0))
        else:
            self.pool_effects(self.pool.withdraw(session, 1.0))
        assert session not in self.waiting

    @rule(data=st.data())
    def release(self, data):
        session = self.pick(data)
        if session is None:
            return
        for part in self.mapped.values():
            part.pop(session, None)
        self.pool_effects(self.pool.release(session))

    @rule(data=st.data())
    def connection_ends(self, data):
        if not self.connected:
            return
        self.disconnect(data.draw(st.sampled_from(sorted(self.connected))))

    def disconnect(self, session):
        self.connected.discard(session)
        self.waiting.pop(session, None)
        self.lock.drop(session)
        self.carry_out(self.cohorts.lost(session))
        self.pool_effects(self.pool.session_ended(session))

    @rule(data=st.data(), connection_first=st.booleans())
    def process_exits(self, data, connection_first):
        living = sorted(session for session in self.sessions if session not in self.exited)
        if not living:
            return
        session = data.draw(st.sampled_from(living))
        if connection_first and session in self.connected:
            self.disconnect(session)
        self.exited.add(session)
        self.unmap(session)
        effects = self.cohorts.exited(self.sessions[session], session)
        if self.lock.holder is not None and self.lock.holder.session == session:
            self.owner = None
            self.lock_effects(self.lock.vacate())
        self.carry_out(effects)
        if session in self.connected:
            self.disconnect(session)

    @rule(data=st.data())
    def notice_of_death(self, data):
        living = sorted(session for session in self.sessions if session not in self.exited)
        if living:
            session = data.draw(st.sampled_from(living))
            self.carry_out(self.cohorts.dying(self.sessions[session], session))

    @rule(data=st.data())
    def depart(self, data):
        session = self.pick(data)
        if session is None:
            return
        try:
            self.cohorts.depart(session)
        except GmsError:
            return

    @rule(name=st.sampled_from(["one", "two", "three"]))
    def fence(self, name):
        self.carry_out(self.cohorts.fence(name, "an operator said so"))

    @rule(name=st.sampled_from(["one", "two", "three"]))
    def fence_fails(self, name):
        if (cohort := self.cohorts.by_name.get(name)) is not None and cohort.state == "fencing":
            self.pool_effects(self.pool.fence_failed(name, FenceFailed("it cannot be killed")))

    @rule()
    def drop(self):
        try:
            self.pool_effects(self.pool.drop())
        except LeaseConflict:
            return

    @invariant()
    def nobody_waits_for_a_free_seat(self):
        if self.pool.seat.holder is None:
            assert "hold" not in self.waiting.values()
        if self.lock.holder is None:
            assert "lock" not in self.waiting.values()

    @invariant()
    def memory_is_the_pools(self):
        assert self.memory == {allocation.id for allocation in (*self.pool.allocations, *self.pool.spares)}

    @invariant()
    def holder_of_a_bridge_is_told_when_the_rest_is_free(self):
        if not self.pool.unproven:
            assert "whole" not in self.waiting.values()

    @invariant()
    def members_of_a_fenced_cohort_are_killed_or_have_exited(self):
        for cohort in self.cohorts.by_name.values():
            assert cohort.members, "a cohort without processes is gone"
            if cohort.state == "fencing":
                assert all(session in self.killed or session in self.exited for session in cohort.members)

    @invariant()
    def numbers_rise_by_one(self):
        assert self.epochs == list(range(1, len(self.epochs) + 1))
        assert self.terms == list(range(1, len(self.terms) + 1))

    @invariant()
    def somebody_plans_when_others_wait_for_it(self):
        if "plan" in self.waiting.values():
            assert self.pool.planner is not None


Engines.TestCase.settings = settings(max_examples=300, stateful_step_count=60)
TestEngines = Engines.TestCase


def test_waiter_is_told_once_when_the_reason_stays_the_same():
    seat = Seat("lock")
    assert seat.claim(Claim(1, "one", "engine one")) == [Seated(1, 1)]
    assert seat.claim(Claim(2, "two", "engine two")) == [Wait(2, "engine one has it")]
    assert seat.claim(Claim(3, "three", "engine three")) == [Wait(3, "engine one has it")]
    assert seat.end("engine one is being ended") == [Wait(2, "engine one is being ended"), Wait(3, "engine one is being ended")]
    assert seat.vacate() == [Seated(2, 2), Wait(3, "engine two has it")]


def test_preferred_cohort_is_next_when_it_waits_at_the_end_of_the_queue():
    seat = Seat("lock")
    for number, name in enumerate(["one", "two", "three"], start=1):
        seat.claim(Claim(number, name, name))
    seat.prefer("three")
    assert seat.vacate()[0] == Seated(3, 2)


def test_others_are_refused_when_the_fence_fails_and_the_next_is_granted_when_it_succeeds_later():
    pool = RetainedPool("kv")
    pool.ask_plan(Claim(1, "one", "one"), KINDS[0])
    pool.provide(1, b"", [Allocation(1, 0, 1)])
    pool.hold(1, first=False)
    assert pool.ask_plan(Claim(2, "two", "two"), KINDS[0]) == [Adopt(2)]
    pool.hold(2, first=False)
    error = FenceFailed("stuck")
    assert pool.fence_failed("one", error) == [Refuse(2, error)]
    assert isinstance(pool.hold(2, first=False)[0], Wait)
    assert Seated(2, 2) in pool.cohort_gone("one")


def test_planner_is_asked_again_when_the_first_one_has_gone():
    pool = RetainedPool("kv")
    assert pool.ask_plan(Claim(1, "one", "one"), KINDS[0]) == [MakePlan(1)]
    assert isinstance(pool.ask_plan(Claim(2, "two", "two"), KINDS[0])[0], Wait)
    assert pool.session_ended(1) == [MakePlan(2)]


def test_third_engine_waits_for_the_proof_when_both_fronts_were_given_to_engines_that_may_live():
    pool = RetainedPool("kv")
    for session, name in ((1, "one"), (2, "two"), (3, "three")):
        pool.ask_plan(Claim(session, name, name), KINDS[0])
        if session == 1:
            pool.provide(1, b"", [Allocation(1, 0, 1)], [Allocation(2, 0, 1)])
        pool.hold(session, first=False, bridge=True)
    pool.cohort_ends("one", "it died")
    assert Seated(2, 2) in pool.cohort_mute("one")
    assert pool.turn == 1
    pool.cohort_ends("two", "it died")
    assert pool.cohort_mute("two") == []
    assert pool.cohort_gone("two") == []
    assert Seated(3, 3) in pool.cohort_gone("one")
    assert pool.await_whole(3) == [Whole(3)]
