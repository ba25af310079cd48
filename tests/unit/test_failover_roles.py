"""The role machine, whole, and the state around it under any order of events."""

from __future__ import annotations

import threading
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import ConnectionLost, NotPromoted, RoleConflict
from gms_core.failover.roles import Event, next_role
from gms_core.failover.status import EngineState, EngineStatus, Promoted, RoleChange
from gms_core.protocol.messages import Role

ROLES: tuple[Role, ...] = get_args(Role)
WAY = {("init", Event.READY): "standby", ("standby", Event.ELECTED): "promoting", ("promoting", Event.PROMOTED): "primary"}
LOST = ConnectionLost("the server closed the connection")


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("role", ROLES)
def test_role_is_the_one_of_the_table_when_an_event_happens(role: Role, event: Event) -> None:
    if event is Event.ENDED:
        assert next_role(role, event) == "fenced"
    elif event is Event.SERVER_LOST:
        assert next_role(role, event) == ("primary" if role == "primary" else "fenced")
    elif (role, event) in WAY:
        assert next_role(role, event) == WAY[role, event]
    else:
        with pytest.raises(RoleConflict, match=f"an engine that {event} cannot have been {role}"):
            next_role(role, event)


def new_state() -> EngineState:
    return EngineState("engine-1", "c0ffee", "gms:primary", address="127.0.0.1:8000")


EVENTS = {
    "ready": lambda state: state.ready(),
    "elected": lambda state: state.elected(7),
    "promoted": lambda state: state.promoted(Promoted({"0": 3})),
    "server lost": lambda state: state.server_lost(LOST),
    "ended": lambda state: state.end("stopped"),
    "note": lambda state: state.note("waits for something"),
    "add": lambda state: state.add(map_s=0.5),
}


@given(st.lists(st.sampled_from(sorted(EVENTS))))
def test_engine_is_primary_at_most_once_and_fenced_for_ever_when_events_come_in_any_order(names: list[str]) -> None:
    state, changes = new_state(), list[RoleChange]()
    state.listen(changes.append)
    for name in names:
        before = state.snapshot()
        try:
            EVENTS[name](state)
        except RoleConflict:
            after = state.snapshot()
            assert (after.role, after.term, after.detail) == (before.role, before.term, before.detail)
    roles = ["init", *(change.role for change in changes)]
    assert [change.previous for change in changes] == roles[:-1]
    assert roles[-1] == state.role == state.snapshot().role
    assert roles.count("primary") <= 1
    assert "fenced" not in roles[:-1]
    way = ["init", "standby", "promoting", "primary"]
    lived = [role for role in roles if role != "fenced"]
    assert lived == way[: len(lived)]
    assert list(state.snapshot().entered) == roles


def test_primary_stays_when_the_server_is_lost_and_any_other_is_fenced_by_it() -> None:
    primary, standby = new_state(), new_state()
    primary.ready()
    primary.elected(1)
    primary.promoted(Promoted())
    assert primary.server_lost(LOST)
    assert (primary.role, primary.detail) == ("primary", "server lost: the server closed the connection")
    standby.ready()
    assert not standby.server_lost(LOST)
    assert (standby.role, standby.ended_by) == ("fenced", LOST)
    assert standby.over() is LOST


def test_reason_of_the_end_stays_when_more_happens_afterwards() -> None:
    state = new_state()
    state.end("an operator demoted it")
    state.note("waits for the lock")
    state.server_lost(LOST)
    state.end("again", LOST)
    assert (state.detail, state.ended_by) == ("an operator demoted it", None)
    assert isinstance(state.over(), NotPromoted)


def test_change_tells_who_and_why_when_the_role_changes() -> None:
    state, changes = new_state(), list[RoleChange]()
    state.listen(changes.append)
    state.ready()
    state.elected(4)
    state.serves_at("10.0.0.1:80")
    state.promoted(Promoted({"0": 3, "1": 5}, {"bytes": 2**30}))
    last = changes[-1]
    assert (last.role, last.previous, last.term, last.epochs) == ("primary", "promoting", 4, {"0": 3, "1": 5})
    assert (last.engine, last.cohort, last.lock, last.address) == ("engine-1", "c0ffee", "gms:primary", "10.0.0.1:80")
    assert [change.at for change in changes] == sorted(change.at for change in changes)


def test_status_is_whole_when_it_is_read_back_as_json() -> None:
    state = new_state()
    state.ready()
    state.elected(4)
    state.promoted(Promoted({"0": 3}, {"bytes": 2**30, "hold_s": 0.25}))
    state.add(map_s=0.001)
    status = msgspec.json.decode(msgspec.json.encode(state.snapshot()), type=EngineStatus)
    assert (status.role, status.term, status.epochs) == ("primary", 4, {"0": 3})
    assert status.kv == {"bytes": 2**30, "hold_s": 0.25, "map_s": 0.001}
    assert status.since_s >= 0


def test_one_of_many_threads_changes_the_role_when_all_try_at_once() -> None:
    state, refused, start = new_state(), list[RoleConflict](), threading.Barrier(8)
    state.ready()

    def elect(term: int) -> None:
        start.wait()
        try:
            state.elected(term)
        except RoleConflict as error:
            refused.append(error)

    threads = [threading.Thread(target=elect, args=(term,)) for term in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (state.role, len(refused)) == ("promoting", 7)
