"""Fencing by proof, with real processes: who dies, who is killed for it, and when the next one is granted what they held."""

import contextlib
import os
import signal
import time

import pytest

from gms_core.protocol.messages import Drop, Instruct
from tests.unit.engine_processes import Refused, processes

PAGE = 4096
SIZES = [16 * PAGE, 16 * PAGE]


@pytest.fixture
def start(server):
    with processes() as begin:
        yield lambda *arguments, **options: begin(server.socket, *arguments, **options)


def status_when(server, condition):
    """The server's status once the condition holds for it."""
    deadline = time.monotonic() + 30
    with server.connect() as session:
        while not condition(report := session.status()):
            assert time.monotonic() < deadline, report
            time.sleep(0.005)
    return report


def holder(start, cohort="one"):
    """A process that has planned the pool and holds it."""
    process = start(cohort)
    assert process.ask("plan", "kv", "a") is None
    process.ask("provide", "blocks=2", SIZES)
    process.hold = process.ask("hold", 0.0)
    return process


def test_second_engine_adopts_the_plan_when_the_first_has_made_it(server, start):
    first = start("one")
    assert first.ask("plan", "kv", "a") is None
    second = start("two")
    second.tell("plan", "kv", "a")
    status_when(server, lambda report: any(session.waiting_for for session in report.sessions))
    first.ask("provide", "blocks=2", SIZES)
    assert second.answer() == ["blocks=2", sum(SIZES), 0]


def test_another_engine_plans_when_the_planner_dies(server, start):
    first, second = start("one"), start("two")
    assert first.ask("plan", "kv", "a") is None
    second.tell("plan", "kv", "a")
    status_when(server, lambda report: any(session.waiting_for for session in report.sessions))
    first.kill()
    assert second.answer() is None
    second.ask("provide", "blocks=3", SIZES)


def test_plan_of_another_kind_is_refused_while_the_pool_is_used_and_replaces_it_when_it_is_not(server, start):
    first = holder(start)
    second = start("two")
    with pytest.raises(Refused) as refused:
        second.ask("plan", "kv", "b")
    assert refused.value.code == "identity_mismatch"
    assert "kind" in refused.value.message
    first.kill()
    status_when(server, lambda report: report.retained[0].state == "free" and not report.retained[0].users)
    assert second.ask("plan", "kv", "b") is None
    assert status_when(server, lambda report: report.allocations == 0).retained[0].state == "planning"


def test_next_engine_holds_the_same_memory_when_every_process_of_the_last_one_has_exited(server, start):
    first = holder(start)
    first.ask("write", 7)
    others = [start("one", "engine-core"), start("one", "api-server 0")]
    second = start("two")
    second.ask("plan", "kv", "a")
    second.tell("hold", 30.0)
    status_when(server, lambda report: report.retained[0].waiting)
    others[1].kill()
    assert second.answer() == 2
    assert [process.wait() for process in (first, *others)] == [-signal.SIGKILL] * 3
    assert second.ask("read") == [7]


def test_hold_is_not_granted_when_a_process_of_the_last_holder_is_still_there(server, start):
    first = holder(start)
    # A process that has exited is gone; one that cannot act on its SIGKILL yet is not. Stopping it does not help it: SIGKILL ends it all the same.
    second = start("two")
    second.ask("plan", "kv", "a")
    with pytest.raises(Refused) as refused:
        second.ask("hold", 0.1)
    assert refused.value.code == "acquire_timeout"
    assert "engine of one has it" in refused.value.message
    first.signal(signal.SIGSTOP)
    second.tell("hold", 30.0)
    status_when(server, lambda report: report.retained[0].waiting)
    first.kill()
    assert second.answer() == 2


def test_no_page_of_the_new_epoch_is_touched_when_the_old_holder_writes_until_it_dies(server, start):
    first = holder(start)
    first.ask("write for ever", 0xEE)
    front = start("one", "api-server 0")
    second = start("two")
    second.ask("plan", "kv", "a")
    second.tell("hold", 30.0)
    status_when(server, lambda report: report.retained[0].waiting)
    front.kill()  # the one that writes is alive and well, and has noticed nothing
    assert second.answer() == 2
    second.ask("write", 1)
    for _ in range(20):
        assert second.ask("read") == [1]
    assert first.wait() == -signal.SIGKILL


def test_whole_cohort_is_ended_when_one_connection_closes_and_its_process_lives(server, start):
    first, other = holder(start), start("one", "engine-core")
    other.tell("close")  # it may be killed before it can answer
    assert {first.wait(), other.wait()} == {-signal.SIGKILL}
    report = status_when(server, lambda report: not report.cohorts)
    assert [(end.engine, "connection of its engine-core" in end.reason, end.gone_s > end.noticed_s > 0) for end in report.ends] == [
        ("engine of one", True, True)
    ]
    assert report.retained[0].state == "free"
    assert report.retained[0].bytes == sum(SIZES)


def test_cohort_is_ended_when_a_member_is_silent_for_longer_than_its_deadline(server, start):
    first = holder(start)
    silent = start("one", "api-server 0", deadline_s=0.3)
    for _ in range(10):
        silent.ask("beat")
        time.sleep(0.05)
    silent.signal(signal.SIGSTOP)
    assert {first.wait(), silent.wait()} == {-signal.SIGKILL}


def test_nobody_is_killed_when_a_cohort_departs_in_time(server, start):
    first, other = holder(start), start("one", "api-server 0")
    other.ask("depart", 30.0)
    assert status_when(server, lambda report: report.cohorts[0].state == "departing")
    second = start("two")
    second.ask("plan", "kv", "a")
    second.tell("hold", 30.0)
    other.ask("close")
    first.ask("close")
    status_when(server, lambda report: report.retained[0].waiting and report.retained[0].state == "fencing")
    first.signal(signal.SIGTERM)
    other.signal(signal.SIGTERM)
    assert {first.wait(), other.wait()} == {-signal.SIGTERM}
    assert second.answer() == 2


def test_rest_of_a_departing_cohort_is_killed_when_its_grace_is_over(server, start):
    first, other = start("one"), start("one", "api-server 0")
    other.ask("depart", 0.1)
    assert {first.wait(), other.wait()} == {-signal.SIGKILL}


def test_late_process_cannot_join_when_its_cohort_has_ended(server, start):
    start("one").kill()
    status_when(server, lambda report: not report.cohorts)
    with pytest.raises(Refused) as refused:
        start("one", "rank 1")
    assert refused.value.code == "cohort_fenced"


def test_hold_passes_on_at_once_when_a_living_holder_releases_it(server, start):
    first = holder(start)
    second = start("two")
    second.ask("plan", "kv", "a")
    second.tell("hold", 30.0)
    first.ask("release")
    assert second.answer() == 2
    assert first.ask("plan", "kv", "a") == ["blocks=2", sum(SIZES), 2]


def test_lock_is_granted_in_order_and_only_once_its_owner_has_exited(server, start):
    first, second, third = start("one"), start("two"), start("three")
    assert first.ask("elect", "primary", 0.0) == 1
    second.tell("elect", "primary", 30.0)
    status_when(server, lambda report: report.locks[0].waiting == ("two",))
    third.tell("elect", "primary", 30.0)
    status_when(server, lambda report: report.locks[0].waiting == ("two", "three"))
    first.kill()
    assert second.answer() == 2
    second.kill()
    assert third.answer() == 3


def test_promoted_engine_goes_first_when_an_operator_says_so(server, start):
    first, second, third = start("one"), start("two"), start("three")
    first.ask("elect", "primary", 0.0)
    for process, waiting in ((second, ("two",)), (third, ("two", "three"))):
        process.tell("elect", "primary", 30.0)
        status_when(server, lambda report, waiting=waiting: report.locks[0].waiting == waiting)
    with server.connect() as session:
        session.perform(Instruct("three", "promote"))
        session.perform(Instruct("one", "demote"))
    assert first.ask("report", "primary") == "demote"
    first.kill()
    assert third.answer() == 2
    assert third.ask("report", "promoting") == "promote"
    assert third.ask("report", "primary") == ""


def test_sibling_is_told_when_its_engine_becomes_primary(server, start):
    first, sibling = start("one"), start("one", "api-server 1")
    sibling.tell("await role", "primary", 30.0)
    status_when(server, lambda report: any(session.waiting_for for session in report.sessions))
    first.ask("report", "standby")
    first.ask("report", "primary")
    assert sibling.answer() is None


def test_memory_is_freed_when_nobody_uses_it_and_an_operator_drops_it(server, start):
    first = holder(start)
    with server.connect() as session:
        with pytest.raises(Exception, match="in use"):
            session.perform(Drop("kv"))
        first.kill()
        status_when(server, lambda report: not report.cohorts)
        session.perform(Drop("kv"))
        assert session.status().retained[0].state == "empty"
    status_when(server, lambda report: report.allocations == 0)


def test_retained_memory_is_refused_when_a_process_has_joined_no_cohort(server):
    from gms_core.client import RetainedPool
    from gms_core.errors import LeaseConflict
    from gms_core.layout import Identity

    with server.connect() as session, pytest.raises(LeaseConflict, match="joined no cohort"):
        RetainedPool(session, "kv").plan(Identity({}), 0.0)


def test_rest_of_a_cohort_is_killed_before_the_first_one_has_exited_when_the_kernel_gives_notice(server, start):
    fat, other = start("one", "engine-core"), start("one", "api-server 0")
    fat.ask("fatten", 2**29)
    fat.kill()
    assert {fat.wait(), other.wait()} == {-signal.SIGKILL}
    report = status_when(server, lambda report: not report.cohorts)
    assert "engine-core" in report.ends[0].reason
    assert "is dying" in report.ends[0].reason


def test_next_engine_is_granted_when_the_last_one_had_exited_before_the_server_could_look(server, start):
    first = holder(start)
    second = start("two")
    second.ask("plan", "kv", "a")
    second.tell("hold", 30.0)
    status_when(server, lambda report: report.retained[0].waiting)
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    first.kill()
    first.wait()
    os.kill(pid, signal.SIGCONT)
    assert second.answer() == 2


def test_server_keeps_no_descriptor_when_cohorts_have_come_and_gone(server, start):
    pid = server.pid

    def kept():
        found = []
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # the server closes others, as that of a client who left, while we read
                target = os.readlink(f"/proc/{pid}/fd/{number}")
                found += [target] if "pidfd" in target or "memfd" in target else []
        return sorted(found)

    before = kept()
    for cohort in ("one", "two"):
        start(cohort).kill()
        status_when(server, lambda report: not report.cohorts)
    status_when(server, lambda report: len(report.sessions) == 1)
    assert kept() == before


def bridged_holder(start, cohort="one"):
    """A rank that holds a pool whose first allocation is the front, and the API server of its engine."""
    rank, front = start(cohort), start(cohort, "api-server 0")
    assert rank.ask("plan", "kv", "a") is None
    rank.ask("provide", "blocks=2", SIZES, [0])
    assert rank.ask("hold", 0.0, "bridge") == 1
    return rank, front


def test_bridge_is_granted_when_nobody_of_the_last_engine_can_answer_and_the_rest_when_it_is_gone(server, start):
    rank, front = bridged_holder(start)
    rank.ask("write", 0xAA)
    rank.ask("fatten", 2**29)  # the kernel takes its time to end a process with much memory, as it does with an engine
    second = start("two")
    second.ask("plan", "kv", "a")
    second.tell("hold", 30.0, "bridge")
    status_when(server, lambda report: report.retained[0].waiting)
    front.kill()
    granted = second.answer()
    if granted == [2, 1]:
        assert second.ask("read", "front") == [0], "the spare is memory that the one before never had"
        second.ask("write front", 0xBB)
        second.ask("await whole", 30.0)
        assert second.ask("read") == [0xAA, 0xBB]
    else:
        assert granted == 2, "the one before was gone already"
        assert second.ask("read") == [0xAA]
    assert rank.wait() == -signal.SIGKILL


def test_bridge_waits_for_the_proof_when_the_holder_of_the_last_bridge_dies_too(server, start):
    rank, front = bridged_holder(start)
    rank.ask("fatten", 2**29)
    second, second_front, third = start("two"), start("two", "api-server 0"), start("three")
    for process in (second, third):
        process.ask("plan", "kv", "a")
    second.tell("hold", 30.0, "bridge")
    status_when(server, lambda report: report.retained[0].waiting)
    third.tell("hold", 30.0, "bridge")
    status_when(server, lambda report: len(report.retained[0].waiting) == 2)
    front.kill()
    assert second.answer() in (2, [2, 1])
    second_front.kill()
    granted = third.answer()
    with server.connect() as session:
        assert "one" in [end.cohort for end in session.status().ends], "both fronts were given to engines that may have a process left"
    assert granted in (3, [3, 0], [3, 1])
    third.ask("await whole", 30.0)
    assert {rank.wait(), second.wait()} == {-signal.SIGKILL}
