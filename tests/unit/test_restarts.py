"""When `gms run` starts which engine: the pure rules, under any order of events."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.fleet.restarts import (
    Fleet,
    GiveUp,
    Policy,
    Rest,
    Seen,
    Start,
    Step,
    ended,
    new_fleet,
    next_step,
    observed,
    started,
)
from gms_core.protocol.messages import Role

POLICY = Policy()
OPERATED = Policy(autonomous=False)
ROLES: tuple[Role, ...] = ("init", "standby", "promoting", "primary", "fenced")


def _saw(fleet: Fleet, policy: Policy = POLICY, elsewhere: bool = False, **roles: Role | tuple[Role, float]) -> Fleet:
    seen = {int(name[1:]): Seen(*((role, 0.0) if isinstance(role, str) else role)) for name, role in roles.items()}
    return observed(fleet, seen, policy, primary_elsewhere=elsewhere)


def _step(fleet: Fleet, now: float = 0.0, policy: Policy = POLICY, server_up: bool = True) -> Step:
    return next_step(fleet, now, policy, server_up=server_up)


def test_first_engine_is_started_alone_when_the_server_answers() -> None:
    fleet = new_fleet((0, 1, 2))
    assert _step(fleet, server_up=False) == Rest(math.inf)
    assert _step(fleet) == Start(0)
    assert _step(started(fleet, 0)) == Rest(math.inf)


def test_shadows_follow_one_by_one_when_there_is_a_primary() -> None:
    fleet = _saw(started(new_fleet((0, 1, 2)), 0), n0="primary")
    assert _step(fleet) == Start(1)
    fleet = started(fleet, 1)
    for role in ("init", "promoting", "fenced"):
        assert _step(_saw(fleet, n0="primary", n1=role)) == Rest(math.inf)
    fleet = _saw(fleet, n0="primary", n1="standby")
    assert _step(fleet) == Start(2)
    assert _step(_saw(started(fleet, 2), n0="primary", n1="standby", n2="standby")) == Rest(math.inf)


def test_several_shadows_start_at_once_if_that_is_wanted_beside_one_that_is_ready() -> None:
    policy = Policy(parallel_starts=2)
    fleet = started(new_fleet((0, 1, 2, 3)), 0)
    assert _step(fleet, policy=policy) == Rest(math.inf)
    fleet = _saw(fleet, policy, n0="primary")
    assert _step(fleet, policy=policy) == Start(1)
    fleet = started(fleet, 1)
    assert _step(fleet, policy=policy) == Start(2)
    fleet = started(fleet, 2)
    assert _step(fleet, policy=policy) == Rest(math.inf)
    assert _step(_saw(fleet, policy, n0="primary", n1="standby", n2="init"), policy=policy) == Start(3)


def test_all_parts_are_started_when_another_node_decides_which_engine_starts_next() -> None:
    policy = Policy(follows=True)
    fleet = new_fleet((0, 1, 2))
    assert _step(fleet, policy=policy, server_up=False) == Rest(math.inf)
    for number in (0, 1, 2):
        assert _step(fleet, policy=policy) == Start(number)
        fleet = started(fleet, number)
    assert _step(fleet, policy=policy) == Rest(math.inf)
    fleet = _saw(fleet, policy, n0="primary", n1="promoting", n2="init")
    fleet = ended(fleet, 0, 10.0, policy)
    assert _step(fleet, 10.0, policy) == Rest(11.0)
    assert _step(fleet, 11.0, policy) == Start(0)


def test_following_node_gives_up_when_nothing_comes_of_any_part() -> None:
    policy = Policy(follows=True)
    fleet = new_fleet((0, 1))
    for turn in range(policy.most_failures):
        fleet = ended(started(fleet, turn % 2), turn % 2, 0.0, policy)
    assert _step(fleet, 1000.0, policy) == GiveUp(policy.most_failures)


def test_nothing_starts_during_a_promotion_however_many_may() -> None:
    policy = Policy(parallel_starts=8)
    fleet = _saw(started(_saw(started(new_fleet((0, 1, 2)), 0), policy, n0="primary"), 1), policy, n0="primary", n1="standby")
    fleet = _saw(ended(fleet, 0, 0.0, policy), policy, n1="promoting")
    assert _step(fleet, 100.0, policy) == Rest(math.inf)
    assert isinstance(_step(_saw(fleet, policy, n1="primary"), 100.0, policy), Start)


def test_nothing_starts_while_an_engine_is_being_ended_however_many_may() -> None:
    policy = Policy(parallel_starts=8)
    fleet = _saw(started(new_fleet((0, 1, 2)), 0), policy, n0="primary")
    fleet = _saw(started(started(fleet, 1), 2), policy, n0="primary", n1=("standby", 60.0), n2=("standby", 60.0))
    fleet = ended(fleet, 2, 0.0, policy)
    dying = observed(fleet, {0: Seen("primary", 9.0, fencing=True), 1: Seen("standby", 60.0)}, policy, primary_elsewhere=False)
    assert _step(dying, 100.0, policy) == Rest(math.inf)


@pytest.mark.parametrize(
    ("fleet", "step"),
    [
        (_saw(started(new_fleet((0, 1)), 0), n0=("standby", 4.9)), Rest(math.inf)),
        (_saw(started(new_fleet((0, 1)), 0), n0=("standby", 5.0)), Start(1)),
        (_saw(started(new_fleet((0, 1)), 0), elsewhere=True, n0="standby"), Start(1)),
    ],
    ids=["it is about to be elected", "its lock is with somebody unseen", "another run has the primary"],
)
def test_shadow_waits_for_a_standby_only_as_long_as_that_can_be_elected(fleet: Fleet, step: Step) -> None:
    assert _step(fleet) == step


def test_standby_is_enough_when_an_operator_promotes() -> None:
    assert _step(_saw(started(new_fleet((0, 1)), 0), OPERATED, n0="standby"), policy=OPERATED) == Start(1)


def test_dead_primary_is_started_again_when_a_shadow_has_taken_over() -> None:
    fleet = _saw(started(_saw(started(new_fleet((0, 1)), 0), n0="primary"), 1), n0="primary", n1=("standby", 60.0))
    fleet = ended(fleet, 0, 100.0, POLICY)
    assert _step(fleet, 100.0) == Rest(101.0)
    assert _step(_saw(fleet, n1="promoting"), 101.0) == Rest(math.inf), "nothing is started beside a promotion"
    assert _step(_saw(fleet, n1="primary"), 101.0) == Start(0)
    assert fleet.place(0).failures == 0


def test_delay_grows_to_its_bound_when_an_engine_fails_again_and_again() -> None:
    fleet, now, delays = new_fleet((0,)), 0.0, []
    for _ in range(8):
        fleet = ended(started(fleet, 0), 0, now, replace(POLICY, most_failures=99))
        delays.append(fleet.place(0).due - now)
        now = fleet.place(0).due
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    fleet = ended(_saw(started(fleet, 0), n0="standby"), 0, now, POLICY)
    assert fleet.place(0).due - now == 1, "a life that was ready begins the count anew"


@pytest.mark.parametrize("role", ["init", "promoting", "fenced"])
def test_life_has_failed_when_it_ends_in_a_role_that_leads_nowhere(role: Role) -> None:
    assert ended(_saw(started(new_fleet((0,)), 0), n0=role), 0, 0.0, POLICY).barren == 1


def test_life_has_not_failed_when_it_was_the_primary_before_it_was_fenced() -> None:
    fleet = _saw(_saw(started(new_fleet((0,)), 0), n0="primary"), n0="fenced")
    assert ended(fleet, 0, 0.0, POLICY).barren == 0


def test_primary_that_is_being_fenced_is_none_when_it_still_says_that_it_is() -> None:
    fleet = observed(started(new_fleet((0,)), 0), {0: Seen("primary", 9.0, fencing=True)}, POLICY, primary_elsewhere=False)
    assert not fleet.has_primary
    assert _step(fleet) == Rest(math.inf)


def _failing(fleet: Fleet, times: int) -> Fleet:
    for _ in range(times):
        fleet = ended(started(fleet, 0), 0, 0.0, POLICY)
    return fleet


def test_run_gives_up_when_the_last_of_too_many_starts_has_failed() -> None:
    fleet = new_fleet((0, 1))
    assert _step(_failing(fleet, 4), 99.0) == Start(0), "others are not tried before one was ready"
    assert _step(_failing(fleet, 5), 99.0) == GiveUp(5)


def test_run_does_not_give_up_when_somebody_serves() -> None:
    fleet = _saw(started(new_fleet((0, 1)), 1), n1="primary")
    for _ in range(20):
        fleet = _saw(ended(started(fleet, 0), 0, 0.0, POLICY), n1="primary")
    assert _step(fleet, 29.0) == Rest(30.0)
    assert _step(fleet, 30.0) == Start(0)
    before = _saw(started(new_fleet((0,)), 0), elsewhere=True, n0="standby")
    elsewhere = _saw(_failing(ended(before, 0, 0.0, POLICY), 9), elsewhere=True)
    assert isinstance(_step(elsewhere, 99.0), Start)


def test_run_gives_up_beside_a_primary_of_another_run_when_its_own_engines_were_never_ready() -> None:
    fleet = new_fleet((0,))
    for _ in range(5):
        fleet = _saw(_failing(fleet, 1), elsewhere=True)
    assert _step(fleet, 99.0) == GiveUp(5)


def test_run_gives_up_at_once_when_the_command_line_is_wrong() -> None:
    fleet = ended(started(new_fleet((0, 1)), 0), 0, 0.0, POLICY, 2)
    assert _step(fleet, 99.0) == GiveUp(1, refused=True)
    assert _step(_saw(fleet, elsewhere=True), 99.0) == GiveUp(1, refused=True)


def test_run_goes_on_when_an_engine_exits_with_2_for_another_reason() -> None:
    joined = ended(_saw(started(new_fleet((0,)), 0), n0="init"), 0, 0.0, POLICY, 2)
    assert _step(joined, 99.0) == Start(0)
    worked = ended(_saw(started(new_fleet((0,)), 0), n0="primary"), 0, 0.0, POLICY, 1)
    assert _step(ended(started(worked, 0), 0, 0.0, POLICY, 2), 99.0) == Start(0)


def test_engine_is_starting_when_it_has_never_been_ready() -> None:
    fleet = started(new_fleet((0,)), 0)
    assert fleet.place(0).starting
    assert _saw(fleet, n0="init").place(0).starting
    for role in ("standby", "promoting", "primary", "fenced"):
        assert not _saw(fleet, n0=role).place(0).starting
    assert not new_fleet((0,)).place(0).starting


def test_standby_is_none_when_its_server_does_not_know_it_any_more() -> None:
    fleet = _saw(started(_saw(started(new_fleet((0, 1)), 0), n0="primary"), 1), n0="primary", n1="standby")
    after = observed(fleet, {}, POLICY, primary_elsewhere=False, lost=(0, 1))
    assert not after.place(1).standby
    assert after.place(1).starting
    assert after.place(0).primary, "a primary serves without its server"


def test_run_does_not_give_up_when_a_standby_waits_for_its_order() -> None:
    fleet = _saw(started(new_fleet((0, 1)), 1), OPERATED, n1="standby")
    for _ in range(9):
        fleet = _saw(ended(started(fleet, 0), 0, 0.0, OPERATED), OPERATED, n1="standby")
    assert _step(fleet, 99.0, OPERATED) == Start(0)


def test_run_waits_for_the_one_that_still_starts_when_the_others_are_hopeless() -> None:
    fleet = _failing(started(_saw(started(new_fleet((0, 1, 2)), 0), n0="primary"), 1), 1)
    fleet = replace(_saw(fleet, n1="init"), barren=9)
    assert _step(fleet, 99.0) == Rest(math.inf)
    assert _step(ended(fleet, 1, 99.0, POLICY), 99.0) == GiveUp(10)


def test_what_was_known_stays_when_the_server_is_lost() -> None:
    fleet = _saw(started(new_fleet((0, 1)), 0), n0="primary")
    after = observed(fleet, {}, POLICY, primary_elsewhere=False)
    assert after == fleet
    assert _step(after, server_up=False) == Rest(math.inf)


def test_late_news_of_an_engine_change_nothing_when_it_does_not_run() -> None:
    fleet = _failing(new_fleet((0,)), 1)
    assert _saw(fleet, n0="primary") == fleet


EVENTS = st.one_of(
    st.tuples(st.just("see"), st.integers(0, 3), st.sampled_from(ROLES), st.floats(0, 20), st.booleans(), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 3)),
    st.tuples(st.just("wait"), st.floats(0, 40)),
    st.tuples(st.just("server"), st.booleans()),
)


@given(st.integers(1, 4), st.booleans(), st.integers(1, 3), st.lists(EVENTS, max_size=60))
def test_rules_hold_when_anything_happens(size: int, autonomous: bool, parallel: int, events: list[tuple]) -> None:  # type: ignore[type-arg]
    policy = Policy(autonomous=autonomous, parallel_starts=parallel)
    fleet, now, server_up = new_fleet(tuple(range(size))), 0.0, True
    for kind, *facts in events:
        number = facts[0] % size if kind in ("see", "end") else 0
        if kind == "see":
            _, role, age, fencing, elsewhere = facts
            fleet = observed(fleet, {number: Seen(role, age, fencing)}, policy, primary_elsewhere=elsewhere)
        elif kind == "end" and fleet.place(number).running:
            fleet = ended(fleet, number, now, policy)
            place = fleet.place(number)
            assert policy.first_delay_s - 1e-9 <= place.due - now <= policy.longest_delay_s + 1e-9
        elif kind == "wait":
            now += facts[0]
        elif kind == "server":
            server_up = facts[0]
        step = next_step(fleet, now, policy, server_up=server_up)
        if isinstance(step, Start):
            assert server_up
            place = fleet.place(step.number)
            assert not place.running
            assert place.due <= now
            starting = [other for other in fleet.places if other.starting]
            others = [other for other in fleet.places if other.running and other not in starting]
            assert all(other.primary or other.standby for other in others), "nothing starts while one takes over or is being ended"
            assert len(starting) < parallel
            assert not starting or others or fleet.primary_elsewhere, "the first one starts alone"
            fleet = started(fleet, step.number)
        elif isinstance(step, GiveUp):
            assert fleet.barren >= policy.most_failures
            assert not any(place.running for place in fleet.places)
            assert not (fleet.primary_elsewhere and fleet.proven)
        else:
            assert step.until > now


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["init", "standby", "primary"])), max_size=30))
def test_all_engines_run_in_the_end_when_no_more_of_them_die(size: int, deaths: list[tuple[int, Role]]) -> None:
    policy = Policy(most_failures=99)
    fleet, now = new_fleet(tuple(range(size))), 0.0
    for number, role in deaths:
        fleet = _until_it_rests(fleet, now, policy)
        if fleet.place(number % size).running:
            fleet = observed(fleet, {number % size: Seen(role, 0.0)}, policy, primary_elsewhere=False)
            fleet = ended(fleet, number % size, now, policy)
        now += 1.0
    for _ in range(10 * size):
        fleet = _until_it_rests(fleet, now, policy)
        now += 40.0
        seen = {place.number: Seen("standby", 60.0) for place in fleet.places if place.running}
        if seen:
            seen[min(seen)] = Seen("primary", 60.0)
        fleet = observed(fleet, seen, policy, primary_elsewhere=False)
    assert all(place.running for place in fleet.places)


def _until_it_rests(fleet: Fleet, now: float, policy: Policy) -> Fleet:
    while isinstance(step := next_step(fleet, now, policy, server_up=True), Start):
        fleet = started(fleet, step.number)
    return fleet
