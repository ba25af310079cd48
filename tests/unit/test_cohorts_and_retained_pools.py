"""The pure machines of fencing together, under any order of events: never two holders, never a grant before the proof, never a lost waiter."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gms_core.errors import CohortFenced, FenceFailed, GmsError, IdentityMismatch, LeaseConflict
from gms_core.layout import Allocation, Identity
from gms_core.server.cohorts import Cohorts, Gone, Kill, Member, Mute
from gms_core.server.effects import Free, Refuse, Wait
from gms_core.server.retained import Adopt, GrantHold, MakePlan, RetainedPool, Whole
from gms_core.server.seat import Claim, Seat, Seated

KINDS = [Identity({"kind": "a"}), Identity({"kind": "b"})]
NAMES = ["one", "two", "three", "four"]


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
                self.ending(effect.cohort, effect.reason)
            elif isinstance(effect, Mute):
                assert all(session in self.exited for session in self.serving if self.sessions[session] == effect.cohort)
                self.pool_effects(self.pool.cohort_mute(effect.cohort))
            elif isinstance(effect, Gone):
                assert all(session in self.exited for session, cohort in self.sessions.items() if cohort == effect.cohort)
                self.pool_effects(self.pool.cohort_gone(effect.cohort))

    def ending(self, cohort, reason):
        self.lock_effects(self.lock.cohort_ends(cohort, reason))
        self.pool_effects(self.pool.cohort_ends(cohort, reason))

    def answered(self, effect, kinds):
        if isinstance(effect, Wait) or (isinstance(effect, Refuse) and effect.session not in self.connected):
            return
        assert self.waiting.pop(effect.session) in kinds
        assert effect.session in self.connected
        if not isinstance(effect, Refuse):
            assert self.cohorts.by_name[self.sessions[effect.session]].state == "alive", "a cohort that ends was given something"

    def pool_effects(self, effects):
        for effect in effects:
            if isinstance(effect, Free):
                assert not any(self.mapped.values()), "memory was freed that somebody maps"
                self.memory -= set(effect.ids)
                continue
            if isinstance(effect, GrantHold):
                self.map(effect.session, effect.turn)
                if effect.whole:
                    self.map(effect.session, "rest")
                self.epochs.append(effect.epoch)
            if isinstance(effect, Whole):
                self.map(effect.session, "rest")
            self.answered(effect, {"plan", "hold", "whole"})

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
            self.answered(effect, {"lock"})

    def claim(self, session):
        return Claim(session, self.sessions[session], self.sessions[session])

    def pick(self, data):
        free = sorted(session for session in self.connected if session not in self.waiting)
        return data.draw(st.sampled_from(free)) if free else None

    @rule(name=st.sampled_from(NAMES), serves=st.booleans())
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
            self.cohorts.alive(session)
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
            self.cohorts.alive(session)
            self.pool_effects(self.pool.await_whole(session))
        except GmsError:
            del self.waiting[session]

    @rule(data=st.data(), first=st.booleans(), bridge=st.booleans())
    def hold(self, data, first, bridge):
        session = self.pick(data)
        if session is None:
            return
        self.waiting[session] = "hold"
        try:
            self.cohorts.alive(session)
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
            self.cohorts.alive(session)
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

    @rule(data=st.data())
    def process_exits(self, data):
        living = sorted(session for session in self.sessions if session not in self.exited)
        if not living:
            return
        session = data.draw(st.sampled_from(living))
        self.exited.add(session)
        self.unmap(session)
        effects = self.cohorts.exited(self.sessions[session], session)
        if self.lock.holder is not None and self.lock.holder.session == session:
            self.owner = None
            self.lock_effects(self.lock.vacate())
        self.carry_out(effects)

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
            cohort = self.cohorts.depart(session)
        except GmsError:
            return
        self.ending(cohort.name, "it ends in an orderly way")

    @rule(name=st.sampled_from(NAMES))
    def prefer(self, name):
        self.lock.prefer(name)
        self.pool_effects(self.pool.prefer(name))

    @rule(name=st.sampled_from(NAMES))
    def fence(self, name):
        self.carry_out(self.cohorts.fence(name, "an operator said so"))

    @rule(name=st.sampled_from(NAMES), final=st.booleans())
    def fence_fails(self, name, final):
        if (cohort := self.cohorts.by_name.get(name)) is not None and cohort.state == "fencing":
            self.pool_effects(self.pool.fence_failed(name, FenceFailed("it cannot be killed"), final=final))

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
    def no_holder_is_gone(self):
        if self.lock.holder is not None:
            assert self.lock.holder.session not in self.exited
        if self.pool.seat.holder is not None and self.pool.unproven is None:
            assert self.pool.seat.holder.cohort in self.cohorts.by_name
        if self.pool.unproven is not None:
            assert self.pool.unproven.cohort in self.cohorts.by_name

    @invariant()
    def nobody_who_ends_is_next(self):
        planning = [self.pool.planner] if self.pool.planner is not None else []
        asking = [one.claim for one in (*planning, *self.pool.asking)]
        for claim in (*asking, *self.lock.queue, *self.pool.seat.queue):
            assert self.cohorts.by_name[claim.cohort].state == "alive"

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
    assert pool.fence_failed("one", error, final=True) == [Refuse(2, error)]
    assert isinstance(pool.hold(2, first=False)[0], Wait)
    assert GrantHold(2, 2, 0, whole=True) in pool.cohort_gone("one")


def test_next_in_line_is_granted_when_the_one_before_it_was_gone_first():
    seat, pool = Seat("lock"), RetainedPool("kv")
    for number, name in enumerate(["one", "two", "three"], start=1):
        seat.claim(Claim(number, name, name))
        pool.ask_plan(Claim(number, name, name), KINDS[0])
        if number == 1:
            pool.provide(1, b"", [Allocation(1, 0, 1)])
        pool.hold(number, first=False)
    for effects in (seat.cohort_ends("two", "it died"), pool.cohort_ends("two", "it died")):
        assert [(type(effect), effect.session) for effect in effects] == [(Refuse, 2)]
        assert isinstance(effects[0].error, CohortFenced)
    assert pool.cohort_gone("two") == []
    assert seat.vacate() == [Seated(3, 2)]
    assert pool.cohort_gone("one") == [GrantHold(3, 2, 0, whole=True)]


def test_cohort_that_departs_asks_for_nothing_more_and_may_still_report():
    cohorts = Cohorts()
    cohorts.join("one", "one", Member(1, 1001, "rank", 0.0))
    cohorts.depart(1)
    with pytest.raises(CohortFenced, match="orderly"):
        cohorts.alive(1)
    assert cohorts.report(1, "fenced", "", 1.0) == ("", [])


def test_other_plans_when_the_cohort_of_the_planner_ends():
    pool = RetainedPool("kv")
    pool.ask_plan(Claim(1, "one", "one"), KINDS[0])
    for session, name in ((2, "two"), (3, "three")):
        pool.ask_plan(Claim(session, name, name), KINDS[0])
    assert [(type(effect), effect.session) for effect in pool.cohort_ends("two", "it died")] == [(Refuse, 2), (Wait, 3)]
    assert pool.cohort_ends("one", "it died") == [MakePlan(3)]
    with pytest.raises(LeaseConflict):
        pool.provide(1, b"", [Allocation(1, 0, 1)])


def test_engine_of_another_kind_is_refused_at_once_when_the_pool_is_being_planned():
    pool = RetainedPool("kv")
    pool.ask_plan(Claim(1, "one", "one"), KINDS[0])
    (refusal,) = pool.ask_plan(Claim(2, "two", "two"), KINDS[1])
    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, IdentityMismatch)
    assert pool.provide(1, b"", [Allocation(1, 0, 1)]) == [Adopt(1)]


def bridged():
    """Three engines; the second has the bridge, while processes of the first may be there."""
    pool = RetainedPool("kv")
    for session, name in ((1, "one"), (2, "two"), (3, "three")):
        pool.ask_plan(Claim(session, name, name), KINDS[0])
        if session == 1:
            pool.provide(1, b"", [Allocation(1, 0, 1)], [Allocation(2, 0, 1)])
        pool.hold(session, first=False, bridge=True)
    pool.cohort_ends("one", "it died")
    assert GrantHold(2, 2, 1, whole=False) in pool.cohort_mute("one")
    return pool


def test_waiter_is_told_of_the_processes_that_are_left_when_the_holder_of_a_bridge_has_released_it():
    pool = bridged()
    assert pool.release(2) == [Wait(3, "processes of one are still ending")]
    assert pool.state == "fencing"
    assert pool.cohort_mute("two") == []
    assert pool.cohort_gone("one") == [GrantHold(3, 3, 1, whole=True)]


def test_waiter_is_told_of_the_processes_that_are_left_when_the_holder_of_a_bridge_is_gone():
    pool = bridged()
    assert pool.cohort_ends("two", "two died") == [Wait(3, "two died")]
    assert pool.cohort_gone("two") == [Wait(3, "processes of one are still ending")]


def test_bridge_is_not_granted_when_it_was_asked_for_by_a_claim_that_is_over():
    pool = RetainedPool("kv")
    for session, name in ((1, "one"), (2, "two")):
        pool.ask_plan(Claim(session, name, name), KINDS[0])
        if session == 1:
            pool.provide(1, b"", [Allocation(1, 0, 1)], [Allocation(2, 0, 1)])
        pool.hold(session, first=False, bridge=True)
    pool.withdraw(2, 1.0)
    pool.hold(2, first=False)
    pool.cohort_ends("one", "it died")
    assert pool.cohort_mute("one") == []
    assert pool.cohort_gone("one") == [GrantHold(2, 2, 0, whole=True)]


def test_preferred_engine_is_granted_the_memory_first_when_it_asked_last():
    pool = RetainedPool("kv")
    for session, name in ((1, "one"), (2, "two"), (3, "three")):
        pool.ask_plan(Claim(session, name, name), KINDS[0])
        if session == 1:
            pool.provide(1, b"", [Allocation(1, 0, 1)])
        pool.hold(session, first=False)
    pool.prefer("three")
    assert GrantHold(3, 2, 0, whole=True) in pool.cohort_gone("one")


def test_pool_is_not_dropped_when_somebody_plans_uses_or_holds_it():
    pool = RetainedPool("kv")
    pool.ask_plan(Claim(1, "one", "one"), KINDS[0])
    with pytest.raises(LeaseConflict):
        pool.drop()
    pool.provide(1, b"", [Allocation(1, 0, 1)])
    with pytest.raises(LeaseConflict):
        pool.drop()
    pool.hold(1, first=False)
    pool.session_ended(1)
    with pytest.raises(LeaseConflict):
        pool.drop()
    pool.cohort_gone("one")
    assert pool.drop() == [Free((1,))]


def test_others_wait_on_when_an_exit_is_late_and_are_refused_for_it_when_their_time_is_over():
    pool = bridged()
    pool.ask_plan(Claim(4, "four", "four"), KINDS[0])
    late = FenceFailed("it is late")
    assert pool.fence_failed("one", late, final=False) == []
    pool.await_whole(2)
    assert pool.fence_failed("one", late, final=False) == [Wait(2, "it is late")]
    assert [type(effect) for effect in pool.cohort_ends("two", "two died")] == [Wait, Refuse]
    assert pool.fence_failed("two", late, final=False) == [Wait(3, "it is late")]
    assert pool.hold(4, first=False) == [Wait(4, "it is late")]
    assert pool.withdraw(3, 1.0) == [Refuse(3, late)]
    pool.cohort_gone("two")
    assert pool.cohort_gone("one") == [GrantHold(4, 3, 1, whole=True)]


def test_planner_is_asked_again_when_the_first_one_has_gone():
    pool = RetainedPool("kv")
    assert pool.ask_plan(Claim(1, "one", "one"), KINDS[0]) == [MakePlan(1)]
    assert isinstance(pool.ask_plan(Claim(2, "two", "two"), KINDS[0])[0], Wait)
    assert pool.session_ended(1) == [MakePlan(2)]


def test_third_engine_waits_for_the_proof_when_both_fronts_were_given_to_engines_that_may_live():
    pool = bridged()
    pool.cohort_ends("two", "it died")
    assert pool.cohort_mute("two") == []
    assert pool.cohort_gone("two") == [Wait(3, "processes of one are still ending")]
    assert GrantHold(3, 3, 1, whole=True) in pool.cohort_gone("one")
    assert pool.await_whole(3) == [Whole(3)]
