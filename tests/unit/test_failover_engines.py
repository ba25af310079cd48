"""Whole engines, as far as failover is concerned, against a real server: one serves, and whatever happens to it, exactly one serves afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_core.errors import InvalidArgument
from gms_core.failover.control import Control
from gms_core.failover.follower import Follower
from gms_core.failover.locks import open_lock
from gms_core.failover.process import EngineProcess
from gms_core.failover.status import EngineState
from gms_core.protocol.messages import CohortStatus, Instruct, StatusReport
from tests.conftest import RunningServer, running_server
from tests.unit.failover_processes import ENGINE, Told, engine_options, told_processes

Start = Callable[..., Told]
KILLED = -signal.SIGKILL


@pytest.fixture
def start(server: RunningServer) -> Iterator[Start]:
    """Starts an engine; without other words it has the lock of the server."""
    with told_processes() as begin:

        def engine(name: str, lock: str = "gms:primary", sockets: list[Path] | None = None, **options: Any) -> Told:
            return begin(ENGINE, engine_options(name, sockets or [server.socket], lock, **options))

        yield engine


def status_when(server: RunningServer, condition: Callable[[StatusReport], object]) -> StatusReport:
    """The server's status once the condition holds for it."""
    deadline = time.monotonic() + 60
    with server.connect() as session:
        while not condition(report := session.status()):
            assert time.monotonic() < deadline, report
            time.sleep(0.01)
    return report


def roles(report: StatusReport) -> dict[str, str]:
    return {cohort.engine: cohort.role for cohort in report.cohorts}


def cohort_of(report: StatusReport, engine: str) -> CohortStatus:
    return next(cohort for cohort in report.cohorts if cohort.engine == engine)


def facts(report: StatusReport) -> list[tuple[object, ...]]:
    """What a server that goes on must know of the engines, in their order."""
    return sorted((cohort.name, cohort.engine, cohort.state, cohort.role, [member.pid for member in cohort.members]) for cohort in report.cohorts)


def waits(report: StatusReport, engine: str) -> bool:
    """Whether an engine waits for the server's lock."""
    return f"cohort of {engine}" in (report.locks[0].waiting if report.locks else ())


def undisturbed(engine: Told) -> bool:
    """Whether an engine has noticed nothing of a server's end."""
    return engine.quiet() and not any({"lost", "found", "error"} & said.keys() or said.get("role") == "fenced" for said in engine.heard)


def instruct(server: RunningServer, engine: str, order: Any) -> None:
    with server.connect() as session:
        session.perform(Instruct(f"cohort of {engine}", order))


def lock_of(kind: str, tmp_path: Path) -> str:
    return "gms:primary" if kind == "gms" else f"flock:{tmp_path}/lock"


@pytest.mark.parametrize("kind", ["gms", "flock"])
def test_second_serves_with_the_next_term_when_the_first_is_killed(server: RunningServer, start: Start, tmp_path: Path, kind: str) -> None:
    first = start("engine-1", lock_of(kind, tmp_path))
    first.until(serves=True)
    assert status_when(server, lambda report: roles(report) == {"engine-1": "primary"}).cohorts[0].members[0].pid == first.pid
    second = start("engine-2", lock_of(kind, tmp_path))
    second.until(role="standby")
    waiting = status_when(server, lambda report: "engine-1" in cohort_of(report, "engine-2").detail if len(report.cohorts) == 2 else False)
    assert roles(waiting) == {"engine-1": "primary", "engine-2": "standby"}
    first.kill()
    assert second.until(role="primary")["term"] == 2
    second.until(serves=True)
    assert [facts["role"] for facts in second.heard if "role" in facts] == ["standby", "promoting", "primary"]
    status_when(server, lambda report: roles(report) == {"engine-2": "primary"})


def test_exactly_one_serves_each_time_when_one_primary_after_the_other_is_killed(server: RunningServer, start: Start) -> None:
    waiting = [start(f"engine-{number}") for number in range(4)]
    for term in range(1, 5):
        report = status_when(server, lambda report: "primary" in roles(report).values())
        serving = [cohort for cohort in report.cohorts if cohort.role == "primary"]
        assert len(serving) == 1
        first = next(process for process in waiting if process.pid == serving[0].members[0].pid)
        assert first.until(role="primary")["term"] == term
        waiting.remove(first)
        first.kill()
        assert first.wait() == KILLED
        status_when(server, lambda report, gone=serving[0].engine: gone not in roles(report))


def test_second_serves_when_the_first_is_stopped_and_has_a_deadline(start: Start) -> None:
    first = start("engine-1", deadline_s=1.0)
    first.until(serves=True)
    second = start("engine-2")
    second.until(role="standby")
    first.signal(signal.SIGSTOP)
    second.until(serves=True)
    assert first.wait() == KILLED


def test_second_serves_when_a_process_of_the_first_hangs_and_its_first_api_server_does_not(server: RunningServer, start: Start) -> None:
    first = start("engine-1", deadline_s=1.0)
    first.until(serves=True)
    second = start("engine-2")
    second.until(role="standby")
    first.tell("hang")
    second.until(serves=True)
    assert first.wait() == KILLED
    with server.connect() as session:
        assert "gave no sign of progress for 1 s" in session.status().ends[-1].reason


def test_shadow_is_ended_when_it_hangs_while_it_waits(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    second = start("engine-2", deadline_s=1.0)
    second.until(role="standby")
    second.tell("hang")
    assert second.wait() == KILLED
    status_when(server, lambda report: roles(report) == {"engine-1": "primary"})


def test_promotion_may_take_longer_than_the_deadline_when_it_has_the_time(start: Start) -> None:
    first = start("engine-1", deadline_s=0.6, promotion_s=3.0)
    first.until(promoting=True)
    first.tell("hang")  # as ranks do that wait for their memory
    first.until(serves=True)


@pytest.mark.parametrize("way", ["fails", "hangs"])
def test_next_shadow_takes_its_turn_when_a_promotion_fails(server: RunningServer, start: Start, way: str) -> None:
    first = start("engine-1", autonomous=False, promotion=way, timeout_s=0.5)
    first.until(role="standby")
    second = start("engine-2", autonomous=False)
    second.until(role="standby")
    status_when(server, lambda report: len(report.cohorts) == 2)
    instruct(server, "engine-1", "promote")
    first.until(promoting=True)
    instruct(server, "engine-2", "promote")
    error = first.until_key("error")
    assert error == "PromotionFailed"
    assert first.heard[-1]["message"] == (
        "engine-1 was elected, but could not get its memory: no memory"
        if way == "fails"
        else "engine-1 was elected, but did not have its memory within 0.5 s"
    )
    assert first.wait() == 0
    assert [facts["role"] for facts in first.heard if "role" in facts] == ["standby", "promoting", "fenced"]
    second.until(serves=True)
    report = status_when(server, lambda report: roles(report) == {"engine-2": "primary"})
    assert [(end.engine, "orderly" in end.reason) for end in report.ends] == [("engine-1", True)]


@pytest.mark.parametrize("kind", ["gms", "flock"])
def test_shadow_stands_by_and_takes_over_later_when_the_server_alone_is_killed(
    server: RunningServer, start: Start, tmp_path: Path, kind: str
) -> None:
    first = start("engine-1", lock_of(kind, tmp_path))
    first.until(serves=True)
    shadow = start("engine-2", lock_of(kind, tmp_path))
    shadow.until(role="standby")
    before = status_when(server, lambda report: waits(report, "engine-2") if kind == "gms" else roles(report).get("engine-2") == "standby")
    for _ in range(2):
        server.kill()
        after = status_when(server, lambda report: waits(report, "engine-2") if kind == "gms" else len(report.cohorts) == 2)
        assert (facts(after), after.locks) == (facts(before), before.locks)
    for engine, role in ((first, "primary"), (shadow, "standby")):
        engine.tell("status")
        assert engine.until_key("status") == role
        assert undisturbed(engine)
    first.kill()
    assert shadow.until(role="primary")["term"] == 2
    shadow.until(serves=True)
    status_when(server, lambda report: roles(report) == {"engine-2": "primary"})


def test_shadow_takes_over_when_the_primary_dies_while_there_is_no_server(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    shadow = start("engine-2")
    shadow.until(role="standby")
    status_when(server, lambda report: waits(report, "engine-2"))
    os.kill(server.pid, signal.SIGKILL)
    first.kill()
    server.wait_until_ready()
    assert shadow.until(role="primary")["term"] == 2
    shadow.until(serves=True)
    report = status_when(server, lambda report: roles(report) == {"engine-2": "primary"})
    assert [end.engine for end in report.ends] == ["engine-1"]


def test_engine_that_hangs_is_ended_when_the_server_was_killed_before(server: RunningServer, start: Start) -> None:
    first = start("engine-1", deadline_s=1.0)
    first.until(serves=True)
    second = start("engine-2")
    second.until(role="standby")
    server.kill()
    status_when(server, lambda report: 0 <= cohort_of(report, "engine-1").silent_s < 0.3)  # it beats at the next server, too
    first.tell("hang")
    second.until(serves=True)
    assert first.wait() == KILLED


def test_order_counts_when_the_server_that_was_given_it_is_killed(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    others = {name: start(name) for name in ("engine-2", "engine-3")}
    for name, engine in others.items():
        engine.until(role="standby")
        status_when(server, lambda report, name=name: waits(report, name))
    instruct(server, "engine-3", "promote")
    server.kill()
    status_when(server, lambda report: all(waits(report, name) for name in others))
    first.kill()
    others["engine-3"].until(serves=True)
    status_when(server, lambda report: roles(report) == {"engine-2": "standby", "engine-3": "primary"})


def test_shadow_ends_and_the_primary_goes_on_when_the_server_and_its_keeper_are_killed(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    shadow = start("engine-2")
    shadow.until(role="standby")
    status_when(server, lambda report: roles(report).get("engine-2") == "standby")
    server.lose_everything()
    assert "server lost" in shadow.until(role="fenced")["detail"]
    assert any("lost" in facts or "error" in facts for facts in shadow.rest())
    assert shadow.wait() == 0
    first.until(found=True)
    report = status_when(server, lambda report: roles(report) == {"engine-1": "primary"} and report.locks)
    assert report.locks[0].owner == "cohort of engine-1"
    first.tell("status")
    assert first.until_key("status") == "primary"

    late = start("engine-3")
    late.until(role="standby")
    status_when(server, lambda report: cohort_of(report, "engine-3").detail if "engine-3" in roles(report) else False)
    assert [facts for facts in late.heard if facts.get("role") == "promoting"] == []
    first.kill()
    assert late.until(role="primary")["term"] == 3, "terms go on: the second was given to the first engine when it joined again"


def test_file_keeps_a_second_primary_away_when_a_server_that_knows_nothing_has_elected_it(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    first.signal(signal.SIGSTOP)  # so that it cannot tell the new server that it is elected
    server.lose_everything()
    second = start("engine-2")
    second.until(role="standby")
    report = status_when(server, lambda report: "lock-primary" in cohort_of(report, "engine-2").detail if report.cohorts else False)
    assert report.locks[0].owner == "cohort of engine-2"
    assert "engine-1 (pid" in report.cohorts[0].detail
    first.signal(signal.SIGCONT)
    first.until(found=True)
    assert status_when(server, lambda report: roles(report) == {"engine-1": "primary", "engine-2": "standby"})
    first.kill()
    assert second.until(role="primary")["term"] == 2


def test_engine_waits_for_the_order_when_it_is_not_autonomous(server: RunningServer, start: Start) -> None:
    first = start("engine-1", autonomous=False)
    first.until(role="standby")
    second = start("engine-2", autonomous=False)
    report = status_when(server, lambda report: len(report.cohorts) == 2 and all("failover promote" in cohort.detail for cohort in report.cohorts))
    assert report.locks == ()
    instruct(server, "engine-2", "promote")
    second.until(serves=True)
    report = status_when(server, lambda report: roles(report) == {"engine-1": "standby", "engine-2": "primary"})
    assert [cohort.order for cohort in report.cohorts] == ["", ""]
    second.kill()
    assert second.wait() == KILLED
    instruct(server, "engine-1", "promote")
    first.until(serves=True)


def test_next_serves_and_nobody_is_killed_when_the_primary_is_demoted(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    second = start("engine-2")
    second.until(role="standby")
    status_when(server, lambda report: len(report.cohorts) == 2)
    instruct(server, "engine-1", "demote")
    first.until(demoted=True)
    assert first.wait() == 0
    second.until(serves=True)
    assert [facts for facts in first.rest() if facts.get("demoted")] == []


def test_order_to_demote_is_not_kept_for_later_when_the_engine_is_a_shadow(server: RunningServer, start: Start) -> None:
    first = start("engine-1")
    first.until(serves=True)
    second = start("engine-2")
    second.until(role="standby")
    status_when(server, lambda report: len(report.cohorts) == 2)
    instruct(server, "engine-2", "demote")
    with server.connect() as session:  # two more reports: it has heard the order
        ages = [cohort_of(session.status(), "engine-2").age_s]
        while ages[-1] < ages[0] + 1.5:
            time.sleep(0.05)
            ages.append(cohort_of(session.status(), "engine-2").age_s)
    first.kill()
    second.until(serves=True)
    second.tell("status")
    assert second.until_key("status") == "primary"
    assert not any(facts.get("demoted") for facts in second.heard)


def test_order_to_demote_is_carried_out_after_the_promotion_when_it_comes_during_it(server: RunningServer, start: Start) -> None:
    first = start("engine-1", promotion_s=2.0)
    first.until(promoting=True)
    status_when(server, lambda report: len(report.cohorts) == 1)
    instruct(server, "engine-1", "demote")
    first.until(demoted=True)


@pytest.mark.parametrize("cancels_first", [False, True])
def test_nobody_else_is_touched_when_a_shadow_is_stopped(server: RunningServer, start: Start, cancels_first: bool) -> None:
    first = start("engine-1")
    first.until(serves=True)
    second = start("engine-2", cancels_first=cancels_first)
    second.until(role="standby")
    status_when(server, lambda report: report.locks and report.locks[0].waiting)
    second.tell("stop")
    assert second.wait() == 0  # although one of its threads still waits for the lock
    report = status_when(server, lambda report: roles(report) == {"engine-1": "primary"})
    assert report.locks[0].waiting == ()


def test_orderly_end_is_no_hang_when_it_takes_longer_than_the_deadline(start: Start) -> None:
    first = start("engine-1", deadline_s=2.0, linger_s=4.0)
    first.until(serves=True)
    first.tell("hang")
    first.tell("stop")
    first.until(departed=True)
    assert first.wait() == 0


def test_deadline_is_refused_when_nothing_checks_the_progress(tmp_path: Path) -> None:
    process = EngineProcess("c0ffee", "engine-1", "api-server 0", (tmp_path / "host.sock",), deadline_s=1.0)
    state = EngineState("engine-1", "c0ffee", "gms:primary")
    with pytest.raises(InvalidArgument, match="a deadline of 1 s needs a check"):
        Control(process, state, open_lock("gms:primary"))
    with pytest.raises(InvalidArgument, match="a deadline of 1 s needs a check"):
        Follower(process, state)


def test_further_api_server_serves_and_ends_with_the_first_one(server: RunningServer, start: Start) -> None:
    follower = start("engine-1", process="api-server 1", follows=True)
    follower.until(role="standby")
    first = start("engine-1")
    first.until(serves=True)
    assert follower.until(role="primary")["term"] == 1
    follower.until(serves=True)
    first.tell("stop")
    follower.until(demoted=True)
    assert [first.wait(), follower.wait()] == [0, 0]


def test_further_api_server_may_end_first_when_the_engine_is_stopped(start: Start) -> None:
    follower, first = start("engine-1", process="api-server 1", follows=True), start("engine-1")
    first.until(serves=True)
    follower.until(serves=True)
    follower.tell("stop")
    assert follower.wait() == 0
    first.tell("stop")
    assert first.wait() == 0


def test_hanging_further_api_server_ends_the_engine_when_it_serves_and_not_before(start: Start) -> None:
    follower = start("engine-1", process="api-server 1", follows=True, deadline_s=0.6)
    follower.until(role="standby")
    follower.tell("hang")  # as its check does while the ranks wait for their memory
    first = start("engine-1", promotion_s=2.0)
    first.until(serves=True)
    follower.until(serves=True)
    assert [first.wait(), follower.wait()] == [KILLED, KILLED]


@pytest.mark.parametrize("loss", ["the server", "the server and its keeper"])
def test_further_api_server_goes_on_when_something_is_killed_while_it_serves(server: RunningServer, start: Start, loss: str) -> None:
    follower, first = start("engine-1", process="api-server 1", follows=True), start("engine-1")
    first.until(serves=True)
    follower.until(serves=True)
    if loss == "the server":
        server.kill()
    else:
        server.lose_everything()
        first.until(found=True)
    status_when(server, lambda report: [len(cohort.members) for cohort in report.cohorts] == [2])
    if loss == "the server":
        assert undisturbed(first)
        assert undisturbed(follower)
    first.tell("stop")
    follower.until(demoted=True)
    assert [first.wait(), follower.wait()] == [0, 0]


def test_further_api_server_serves_later_when_the_server_alone_is_killed_before(server: RunningServer, start: Start) -> None:
    follower = start("engine-1", process="api-server 1", follows=True)
    follower.until(role="standby")
    server.kill()
    first = start("engine-1")
    first.until(serves=True)
    server.kill()
    assert follower.until(role="primary")["term"] == 1
    follower.until(serves=True)
    assert undisturbed(follower)
    first.tell("stop")
    follower.until(demoted=True)
    assert [first.wait(), follower.wait()] == [0, 0]


def test_further_api_server_ends_when_the_server_and_its_keeper_are_killed_before_it_serves(server: RunningServer, start: Start) -> None:
    follower = start("engine-1", process="api-server 1", follows=True)
    follower.until(role="standby")
    server.lose_everything()
    assert "server lost" in follower.until(role="fenced")["detail"]
    assert follower.wait() == 0


def test_first_dies_with_it_when_a_further_api_server_is_killed(server: RunningServer, start: Start) -> None:
    follower, first = start("engine-1", process="api-server 1", follows=True), start("engine-1")
    follower.until(serves=True)
    second = start("engine-2")
    second.until(role="standby")
    follower.kill()
    assert first.wait() == KILLED
    second.until(serves=True)


def test_every_server_knows_the_role_when_an_engine_has_several(server: RunningServer, start: Start, tmp_path: Path) -> None:
    with running_server(tmp_path / "other") as other:
        first = start("engine-1", sockets=[server.socket, other.socket, server.socket])
        first.until(serves=True)
        for one in (server, other):
            status_when(one, lambda report: roles(report) == {"engine-1": "primary"})
        shadow = start("engine-2", sockets=[server.socket, other.socket])
        shadow.until(role="standby")
        instruct(other, "engine-1", "demote")
        first.until(demoted=True)
        shadow.until(serves=True)
        assert first.wait() == 0
        shadow.tell("stop")
        assert shadow.wait() == 0


def test_engine_ends_by_its_own_error_when_one_of_its_servers_is_not_there(server: RunningServer, start: Start, tmp_path: Path) -> None:
    first = start("engine-1", sockets=[server.socket, tmp_path / "nobody.sock"])
    assert first.wait() == 1  # not killed for the sessions that it had made already
    status_when(server, lambda report: report.cohorts == ())
