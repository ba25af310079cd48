"""Which nodes of an engine are there, and whether it can go on: the machine alone, with a clock that the test sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gms_core.failover.nodes.together import Together

PATIENCE_S, TIMEOUT_S = 60.0, 2.0


def together(*nodes: int) -> Together:
    return Together(nodes, now=0.0, patience_s=PATIENCE_S, timeout_s=TIMEOUT_S)


def test_engine_goes_on_when_all_are_heard_of() -> None:
    machine = together(1, 2)
    assert machine.missing == (1, 2)
    machine.came(1, 1.0)
    assert machine.refusal(2) == ""
    machine.came(2, 2.0)
    assert machine.missing == ()
    machine.heard(1, 3.5)
    machine.heard(2, 3.5)
    assert machine.reason_to_end(5.4) == ""
    assert 0 < machine.next_look(5.4) <= 0.1 + 1e-9


def test_engine_ends_when_a_node_never_comes() -> None:
    machine = together(1, 2, 3)
    machine.came(2, PATIENCE_S - 0.5)
    assert machine.reason_to_end(PATIENCE_S - 0.1) == ""
    assert machine.reason_to_end(PATIENCE_S) == "nothing was heard of nodes 1, 3 within 60 s"


def test_engine_ends_when_a_node_is_silent_or_goes() -> None:
    machine = together(1, 2)
    machine.came(1, 1.0)
    machine.came(2, 2.0)
    assert machine.reason_to_end(3.0) == "nothing was heard of node 1 for 2 s"
    assert machine.went(2, "cut") == "node 2 is gone: cut"


def test_nodes_may_go_when_the_engine_departs() -> None:
    machine = together(1, 2)
    machine.came(1, 1.0)
    machine.departs()
    assert machine.went(1, "cut") == ""
    assert machine.reason_to_end(1000.0) == ""
    assert machine.refusal(2) == "the engine ends"


def test_strangers_and_doubles_are_refused() -> None:
    machine = together(1)
    assert machine.refusal(7) == "there is no node 7"
    machine.came(1, 0.0)
    assert machine.refusal(1) == "node 1 is there already"


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.0, 1.0)), max_size=60))
def test_no_living_node_is_missed_and_no_silent_one_is_overlooked(steps: list[tuple[int, float]]) -> None:
    machine, now, last = together(1, 2, 3, 4), 0.0, {}
    for node in (1, 2, 3, 4):
        machine.came(node, now)
        last[node] = now
    for node, pause in steps:
        now += pause
        silent = [one for one, heard in last.items() if now - heard >= TIMEOUT_S]
        assert bool(machine.reason_to_end(now)) == bool(silent)
        if silent:
            return
        assert machine.next_look(now) <= min(last.values()) + TIMEOUT_S - now + 1e-9
        machine.heard(node, now)
        last[node] = now
