"""Who measures the device for the KV memory, and who takes the plan over: one answer for all ranks of an engine.

A plan is asked for before anything else that others may have to wait for, and by the first rank before the others, so that two engines that start at
once never wait for each other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from gms_core.client import Membership, RetainedPool, Session
from gms_core.config import settings
from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import ConnectionLost, GmsError, IdentityMismatch
from gms_core.layout import Identity
from gms_vllm.kv_identity import kv_identity
from gms_vllm.kv_plan import KvPlan, check_explicit
from gms_vllm.place import all_ranks, connect, rank_pool

log = logging.getLogger("vllm.gms")

_sessions: list[Session] = []
"""Sessions that have joined a cohort last as long as the process: the server takes the end of one for the death of the process."""


@dataclass(slots=True)
class KvPlanning:
    """What a rank has to do for its pool of KV memory.

    Attributes:
        pool: Its pool.
        place: In the cohort, of the session that has the pool.
        rank: Its number among all ranks.
        budgets: Of all ranks; None if they measure, and have not yet.
        plan: The plan; None as long as this rank has to provide it.
    """

    pool: RetainedPool
    place: Membership
    rank: int = 0
    budgets: tuple[int, ...] | None = None
    plan: KvPlan | None = None

    @property
    def memory_bytes(self) -> int | None:
        """What vLLM is told in place of a measurement; None if this rank measures, and has not yet."""
        return None if self.budgets is None else self.budgets[self.rank]

    def share(self, measured: int) -> tuple[int, ...]:
        """Tell the other ranks what this one has measured, and learn what they have: the budgets. All ranks call it."""
        group = all_ranks()
        self.budgets = (measured,) if group is None else tuple(_gather(measured, group))
        return self.budgets

    @contextlib.contextmanager
    def given_up_on_failure(self) -> Iterator[None]:
        """Whatever fails in the context, other engines need not wait for this one's plan; its process may live on."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(GmsError):
                self.pool.release()
            raise

    def check_or_provide(self, here: KvPlan, sizes: list[int], timeout_s: float, front: list[int] | None = None) -> None:
        """Compare what the engine has become with the plan, or make it the plan, and the memory with it.

        Args:
            here: What the engine has become.
            sizes: Bytes of each allocation.
            timeout_s: Seconds to wait for memory that others are releasing.
            front: Which of the allocations there are to be twice.

        Raises:
            IdentityMismatch: It is not what was planned.
            OutOfMemory: There was no room in time.
        """
        if self.plan is not None:
            self.plan.check_adopted(here, self.pool.name)
            return
        self.pool.provide(here.encode(), sizes, timeout_s, front=front or ())
        self.plan = here
        log.info("pool %s is planned: %d blocks, %d bytes in %d allocations", self.pool.name, here.num_blocks, sum(sizes), len(sizes))


class _Answer(NamedTuple):
    """What the server has told one rank.

    Attributes:
        budgets: Of the plan; None if there is none yet.
        refusal: Why it has told nothing; empty otherwise.
    """

    budgets: tuple[int, ...] | None
    refusal: str = ""

    @classmethod
    def of(cls, plan: KvPlan | None) -> Self:
        """What a plan says, if there is one."""
        return cls(None if plan is None else plan.budgets)


def begin(config: Any, options: GmsConfig, failover: FailoverConfig) -> KvPlanning:
    """Open the pool of this rank, and learn whether there is a plan. All ranks call it, once their device and their groups are set up.

    Args:
        config: A ``VllmConfig``.
        options: The engine's block.
        failover: How it fails over.

    Raises:
        GmsError: The server does not answer, refuses this engine, or the plan is not for it.
    """
    told, rank = settings(), config.parallel_config.rank
    session = connect(options, rank=rank)
    try:
        place = Membership.join(session, told.cohort, told.engine, f"rank {rank} (kv)")
    except BaseException:
        session.close()
        raise
    _sessions.append(session)
    planning = KvPlanning(RetainedPool(session, rank_pool(config, failover.kv_tag)), place, rank)
    with planning.given_up_on_failure():
        _agree(planning, kv_identity(config, options, failover), options.acquire_timeout_s, failover.kv_tag)
        if planning.memory_bytes is not None:
            check_explicit(config.cache_config.kv_cache_memory_bytes, planning.memory_bytes, planning.pool.name)
            log.info("%d bytes of KV memory are planned: nothing is measured, and --gpu-memory-utilization is not used", planning.memory_bytes)
    return planning


def _agree(planning: KvPlanning, identity: Identity, timeout_s: float, tag: str) -> None:
    """Ask for the plan. If one rank knows of one, none of them measures: measuring takes all of them."""
    pool, group = planning.pool, all_ranks()
    if group is None:
        planning.plan = _ask(pool, identity, timeout_s)
        answers = [_Answer.of(planning.plan)]
    else:
        planning.plan, answers = _ask_in_turn(pool, identity, timeout_s, group)
    known = {answer.budgets for answer in answers if answer.budgets is not None}
    if len(known) > 1:
        raise IdentityMismatch(
            f"the ranks' plans of the KV memory are of different engines: {sorted(known)}",
            hint=f"End all engines that use them, and free them: gms failover drop {tag} --ranks",
        )
    planning.budgets = known.pop() if known else None


def _ask_in_turn(pool: RetainedPool, identity: Identity, timeout_s: float, group: Any) -> tuple[KvPlan | None, list[_Answer]]:
    """Ask as one of several ranks; returns this one's plan, and what all were told."""
    if group.rank_in_group > 0:
        if not group.broadcast_object(None, src=0):
            raise ConnectionLost("the first rank of this engine was not told the plan of its KV memory; its log says why")
        try:
            plan = _ask(pool, identity, timeout_s)
        except GmsError as error:
            _gather(_Answer(None, error.message), group)
            raise
    else:
        try:
            plan = _ask(pool, identity, timeout_s)
        except BaseException:
            group.broadcast_object(False, src=0)
            raise
        group.broadcast_object(True, src=0)
    answers = _gather(_Answer.of(plan), group)
    if refusals := [answer.refusal for answer in answers if answer.refusal]:
        raise ConnectionLost(f"another rank of this engine was not told the plan of its KV memory: {refusals[0]}")
    return plan, answers


def _ask(pool: RetainedPool, identity: Identity, timeout_s: float) -> KvPlan | None:
    def waiting(reason: str) -> None:
        log.info("waiting for the plan of pool %s, at most %.0f s: %s", pool.name, timeout_s, reason)

    try:
        planned = pool.plan(identity, timeout_s, waiting)
        return None if planned is None else KvPlan.decode(planned.plan)
    except GmsError as error:
        log.error("no plan of pool %s: %s", pool.name, error)
        raise


def _gather(own: Any, group: Any) -> list[Any]:
    """What all ranks have, in their order."""
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, own, group=group.cpu_group)
    return found
