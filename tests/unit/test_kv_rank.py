"""A rank of an engine that fails over: with which bridge it begins, when it computes, and how it comes to all of its memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from gms_core.engine_log import log
from gms_core.errors import ConnectionLost, EngineAsleep, EngineFailed, GmsError, IdentityMismatch, InvalidArgument
from gms_core.kv.front import View
from gms_core.kv.plan import KvPlan
from gms_core.kv.planning import KvPlanning
from gms_core.kv.rank import RankKv
from gms_core.kv.retained import RetainedKv
from gms_core.vmm.host import HostDriver
from tests.unit.kv_pools import Pool, do_nothing

PAGE = 4096
BLOCKS = 100
VIEW = View(0, (BLOCKS, PAGE), (PAGE, 1), 1)
"""A cache of one tensor, whose blocks are pages."""


@dataclass
class Site:
    """Ranks of engines that stand in for one another, and their pool."""

    driver: HostDriver
    pool: Pool
    asleep: bool = False
    lost: GmsError | None = None
    ranks: list[RankKv] = field(default_factory=list)

    def beat(self) -> None:
        if self.lost is not None:
            raise self.lost

    def rank(self, bridge_bytes: int | None = 10 * PAGE) -> RankKv:
        """A rank that has its addresses."""
        planned: Any = self.pool.planned
        plan = None if planned is None else KvPlan.decode(planned.plan)
        place: Any = SimpleNamespace(beat=self.beat)
        planning = KvPlanning(self.pool, place, budgets=None if plan is None else plan.budgets, plan=plan)  # type: ignore[arg-type]
        memory = RetainedKv(self.driver, do_nothing, [BLOCKS * PAGE], 4 * PAGE)
        self.ranks.append(RankKv(planning, memory, bridge_bytes, lambda: self.asleep))
        return self.ranks[-1]

    def initialised(self, bridge_bytes: int | None = 10 * PAGE, view: View = VIEW, *, explicit: bool = False) -> RankKv:
        """A rank that has its cache, as one engine more would."""
        rank = self.rank(bridge_bytes)
        rank.initialise([view], BLOCKS, "a layout", measured=12345, explicit=explicit, memory_timeout_s=1.0)
        return rank


@pytest.fixture
def site() -> Iterator[Site]:
    with contextlib.closing(HostDriver(capacity=2**24)) as driver:
        pool = Pool(driver)
        found = Site(driver, pool)
        yield found
        pool.proven.set()
        for rank in found.ranks:
            rank.memory.arena.close()
        pool.close()


def test_rank_begins_with_the_blocks_that_fit_when_it_has_measured(site: Site) -> None:
    rank = site.initialised()
    plan = rank.planning.plan
    assert plan is not None
    assert (plan.budgets, plan.num_blocks, plan.buffers, plan.layout, plan.bridge_blocks) == ((12345,), BLOCKS, (BLOCKS * PAGE,), "a layout", 10)
    assert rank.stand_by() == (10, "")


def test_rank_begins_with_the_planned_blocks_when_it_adopts_them(site: Site) -> None:
    site.initialised()
    later = site.initialised(8 * PAGE)
    assert later.bridge_blocks == 10
    assert site.initialised(0).bridge_blocks == 0
    assert site.initialised(2 * PAGE).bridge_blocks == 0, "it is too large for a user that wants a small one"


def test_rank_is_refused_when_its_cache_is_not_the_planned_one(site: Site) -> None:
    site.initialised()
    other = site.rank()
    with pytest.raises(IdentityMismatch), other.planning.given_up_on_failure():
        other.initialise([VIEW], BLOCKS, "another layout", measured=0, explicit=False, memory_timeout_s=1.0)
    assert site.pool.released
    assert other.may_compute(scheduled=True)


@pytest.mark.parametrize(
    ("bridge_bytes", "view", "reason"),
    [
        (0, VIEW, ""),
        (PAGE, VIEW, ""),
        (10 * PAGE, View(0, (BLOCKS, BLOCKS), (PAGE, 1), 1), "not certain where"),
        (4 * PAGE, View(0, (32, BLOCKS, 128), (BLOCKS * 128, 128, 1), 1), "so many places"),
    ],
    ids=["the user wants none", "it would have one block", "it is not certain where blocks lie", "blocks lie in too many places"],
)
def test_rank_begins_with_all_of_its_memory_when_there_can_be_no_bridge(
    site: Site, caplog: pytest.LogCaptureFixture, bridge_bytes: int, view: View, reason: str
) -> None:
    caplog.set_level("INFO", log().name)
    rank = site.initialised(bridge_bytes, view)
    assert rank.stand_by() == (0, "")
    assert reason in caplog.text
    assert rank.promote(1.0, bridge=True).whole


@pytest.mark.parametrize(("bridge_bytes", "explicit", "blocks"), [(None, True, 0), (None, False, 6), (6 * PAGE, True, 6)])
def test_bridge_that_nobody_has_asked_for_needs_room_when_nothing_was_measured(
    site: Site, bridge_bytes: int | None, explicit: bool, blocks: int
) -> None:
    taken = site.driver.create(site.driver.memory_info().free - (BLOCKS + 4 + 1 + 17) * PAGE)  # scratch, the mark, and not three times the bridge
    assert site.initialised(bridge_bytes, explicit=explicit).bridge_blocks == blocks
    site.driver.release(taken)


def test_rank_computes_when_it_is_not_parked_or_when_it_rehearses(site: Site) -> None:
    rank = site.rank()
    assert rank.may_compute(scheduled=True)
    rank.initialise([VIEW], BLOCKS, "a layout", measured=0, explicit=False, memory_timeout_s=1.0)
    assert not rank.may_compute(scheduled=False)
    rank.rehearse(True)
    assert rank.may_compute(scheduled=True)
    rank.rehearse(False)
    assert not rank.may_compute(scheduled=False)
    rank.promote(1.0)
    assert rank.may_compute(scheduled=True)


def test_rank_is_not_promoted_when_its_scheduler_takes_a_refused_step_for_computed(site: Site) -> None:
    rank = site.initialised()
    rank.may_compute(scheduled=True)
    with pytest.raises(EngineFailed):
        rank.promote(1.0)
    assert rank.memory.arena.backing == "scratch"


def test_rank_is_promoted_once_it_is_awake_when_it_slept(site: Site) -> None:
    rank = site.initialised()
    site.asleep = True
    with pytest.raises(EngineAsleep):
        rank.promote(1.0)
    site.asleep = False
    taken = rank.promote(1.0)
    assert (taken.epoch, taken.whole, rank.memory.arena.backing) == (5, True, "pool")
    assert rank.promote(1.0) is taken
    assert (rank.proven(), rank.map_rest()) == (("proven", ""), True)


def test_rank_computes_nothing_when_it_is_parked_after_its_promotion_until_the_next_one(site: Site) -> None:
    rank = site.initialised()
    taken = rank.promote(1.0)
    rank.park()
    assert not rank.may_compute(scheduled=False)
    assert rank.promote(1.0) is taken
    assert rank.may_compute(scheduled=True)


def test_rank_is_refused_when_it_was_never_initialised(site: Site) -> None:
    with pytest.raises(InvalidArgument, match="initialised"):
        site.rank().promote(1.0)


def test_rest_is_mapped_when_it_is_proven_and_the_engine_is_awake(site: Site) -> None:
    rank = site.initialised()
    site.pool.proven.clear()
    taken = rank.promote(1.0, bridge=True)
    assert (taken.whole, taken.bytes, rank.proven()) == (False, 10 * PAGE, ("waiting", ""))
    site.pool.proven.set()
    while rank.proven()[0] == "waiting":
        time.sleep(0.001)
    assert rank.proven() == ("proven", "")
    site.asleep = True
    assert not rank.map_rest()
    site.asleep = False
    assert rank.memory.arena.backing == "front"
    assert rank.map_rest()
    assert rank.memory.arena.backing == "pool"
    assert rank.map_rest()


def test_rank_can_never_be_promoted_when_its_server_was_lost_at_the_start(site: Site) -> None:
    rank = site.initialised()
    site.lost = ConnectionLost("the server has ended")
    blocks, reason = rank.stand_by()
    assert blocks == 0
    assert "the server has ended" in reason
