"""Engines as several servers see them together, and which one an operator means."""

from __future__ import annotations

from typing import Any

import pytest

from gms_core.errors import EngineNotFound, InvalidArgument
from gms_core.fleet.engines import Engine, choose, engines
from gms_core.protocol.messages import CohortStatus, MemberStatus, RetainedStatus, StatusReport


def _cohort(name: str = "a1", engine: str = "engine-0", *, pids: tuple[int, ...] = (1,), **facts: Any) -> CohortStatus:
    members = tuple(MemberStatus(pid=pid, process=f"rank {pid}", age_s=1.0) for pid in pids)
    known = {"state": "alive", "role": "init", "role_age_s": 1.0, "detail": "", "reason": "", "order": "", "age_s": 9.0, "silent_s": -1.0}
    return CohortStatus(name=name, engine=engine, members=members, **{**known, **facts})  # type: ignore[arg-type]


def _report(device: str, *cohorts: CohortStatus, held: dict[str, tuple[str, int]] | None = None) -> StatusReport:
    retained = tuple(
        RetainedStatus(name=pool, state="held", epoch=epoch, identity={}, allocations=1, bytes=1, holder=holder, users=(), waiting=())
        for pool, (holder, epoch) in (held or {}).items()
    )
    return StatusReport("0", 1, device, "host", 1.0, 0, 0, 0, 0, 0, (), (), retained, cohorts)


def _one(*reports: StatusReport) -> Engine:
    (engine,) = engines(reports)
    return engine


def test_engine_is_one_when_it_has_joined_several_servers() -> None:
    first = _report("GPU-0", _cohort(pids=(1, 2), role="primary", role_age_s=3.0, age_s=9.0), held={"kv_cache": ("a1", 2)})
    second = _report("GPU-1", _cohort(pids=(1, 3), role="init", role_age_s=8.0, age_s=8.0, order="demote"), held={"kv_cache": ("a1", 4)})
    for engine in (_one(first, second), _one(second, first)):
        assert (engine.role, engine.role_age_s, engine.age_s, engine.order, engine.epoch) == ("primary", 3.0, 9.0, "demote", 4)
        assert {member.pid for member in engine.members} == {1, 2, 3}
        assert set(engine.devices) == {"GPU-0", "GPU-1"}
        assert engine.epochs == {"GPU-0/kv_cache": 2, "GPU-1/kv_cache": 4}


def test_engine_is_fenced_for_others_when_one_server_ends_it() -> None:
    engine = _one(_report("GPU-0", _cohort(role="primary")), _report("GPU-1", _cohort(state="fencing", reason="its rank 1 has died")))
    assert (engine.role, engine.standing, engine.state, engine.reason) == ("primary", "fenced", "fencing", "its rank 1 has died")


def test_epochs_are_the_holder_s_when_others_only_use_the_pool() -> None:
    found = engines([_report("host", _cohort("a", "engine-1"), _cohort("b", "engine-0"), held={"kv_cache": ("b", 7), "other": ("", 3)})])
    assert [(engine.name, engine.epoch) for engine in found] == [("engine-0", 7), ("engine-1", 0)]


def test_engine_is_chosen_when_its_name_its_cohort_or_its_role_is_the_only_one() -> None:
    found = engines([_report("host", _cohort("a", "engine-0", role="primary"), _cohort("b", "engine-1", role="standby"))])
    assert choose(found, "engine-1", "primary").cohort == "b"
    assert choose(found, "a", "standby").cohort == "a"
    assert choose(found, None, "standby").cohort == "b"


def test_living_engine_is_chosen_when_one_of_its_name_is_being_ended() -> None:
    found = engines([_report("host", _cohort("a", role="primary", state="fencing"), _cohort("b", role="standby", age_s=1.0))])
    assert choose(found, "engine-0", "standby").cohort == "b"
    assert choose(found[:1], "engine-0", "standby").cohort == "a"


def test_choice_is_refused_when_nobody_or_several_are_meant() -> None:
    two = engines([_report("host", _cohort("a", role="standby"), _cohort("b", role="standby"))])
    with pytest.raises(InvalidArgument, match="2 engines are called 'engine-0'"):
        choose(two, "engine-0", "standby")
    with pytest.raises(InvalidArgument, match="2 engines are standby"):
        choose(two, None, "standby")
    with pytest.raises(EngineNotFound, match="no engine is primary"):
        choose(two, None, "primary")
    with pytest.raises(EngineNotFound, match="has joined a server"):
        choose([], "engine-0", "primary")
