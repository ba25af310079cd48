"""Who measures the device for the KV memory, and who takes the plan over: one answer for all ranks of an engine.

A plan is asked for before anything else that others may have to wait for, and by the first rank before the others, so that two engines that start at
once never wait for each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from gms_core.client import Membership, RetainedPool, Session
from gms_core.config import settings
from gms_core.engine_log import log
from gms_core.errors import ConnectionLost, GmsError, IdentityMismatch
from gms_core.kv.plan import KvPlan
from gms_core.layout import Identity
from gms_core.ranks import Ranks

_sessions: list[Session] = []
"""Sessions that have joined a cohort last as long as the process: the server takes the end of one for the death of the process."""


@dataclass(slots=True)
class KvPlanning:
    """What a rank has to do for its pool of KV memory.

    Attributes:
        pool: Its pool.
        place: In the cohort, of the session that has the pool.
        rank: Its number among all ranks.
        ranks: All that compute together, if there are several.
        budgets: Of all ranks; None if they measure, and have not yet.
        plan: The plan; None as long as this rank has to provide it.
    """

    pool: RetainedPool
    place: Membership
    rank: int = 0
    ranks: Ranks | None = None
    budgets: tuple[int, ...] | None = None
    plan: KvPlan | None = None

    @property
    def memory_bytes(self) -> int | None:
        """Bytes that the engine is told of in place of a measurement; None if this rank measures, and has not yet."""
        return None if self.budgets is None else self.budgets[self.rank]

    def share(self, measured: int) -> tuple[int, ...]:
        """Tell the other ranks what this one has measured, and learn what they have: the budgets. All ranks call it."""
        self.budgets = (measured,) if self.ranks is None else tuple(self.ranks.all_gather_object(measured))
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

    def check_or_provide(self, here: KvPlan, sizes: Sequence[int], timeout_s: float, front: Sequence[int] = ()) -> None:
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
        self.pool.provide(here.encode(), sizes, timeout_s, front=front)
        self.plan = here
        log().info("pool %s is planned: %d blocks, %d bytes in %d allocations", self.pool.name, here.num_blocks, sum(sizes), len(sizes))


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


def begin(session: Session, pool: str, identity: Identity, *, tag: str, rank: int, ranks: Ranks | None, timeout_s: float) -> KvPlanning:
    """Take this process's place in the cohort, and learn whether there is a plan. All ranks call it, once their device and their groups are set up.

    Args:
        session: With the server of this rank's device; it lasts as long as the process once that has its place.
        pool: Of this rank's KV memory.
        identity: Of it.
        tag: What the pools of all ranks are called by the user.
        rank: The number of this one.
        ranks: All that compute together, if there are several.
        timeout_s: Seconds to wait for the plan of an engine that measures.

    Raises:
        GmsError: The server refuses this engine, or the plan is not for it.
    """
    told = settings()
    try:
        place = Membership.join(session, told.cohort, told.engine, f"rank {rank} (kv)")
    except BaseException:
        session.close()
        raise
    _sessions.append(session)
    planning = KvPlanning(RetainedPool(session, pool), place, rank, ranks)
    with planning.given_up_on_failure():
        _agree(planning, identity, timeout_s, tag)
    return planning


def _agree(planning: KvPlanning, identity: Identity, timeout_s: float, tag: str) -> None:
    """Ask for the plan. If one rank knows of one, none of them measures: measuring takes all of them."""
    if planning.ranks is None:
        planning.plan = _ask(planning.pool, identity, timeout_s)
        answers = [_Answer.of(planning.plan)]
    else:
        planning.plan, answers = _ask_in_turn(planning.pool, identity, timeout_s, planning.ranks)
    known = {answer.budgets for answer in answers if answer.budgets is not None}
    if len(known) > 1:
        raise IdentityMismatch(
            f"the ranks' plans of the KV memory are of different engines: {sorted(known)}",
            hint=f"End all engines that use them, and free them: gms failover drop {tag} --ranks",
        )
    planning.budgets = known.pop() if known else None


def _ask_in_turn(pool: RetainedPool, identity: Identity, timeout_s: float, ranks: Ranks) -> tuple[KvPlan | None, list[_Answer]]:
    """Ask as one of several ranks; returns this one's plan, and what all were told."""
    if ranks.rank_in_group > 0:
        if not ranks.broadcast_object(None, src=0):
            raise ConnectionLost("the first rank of this engine was not told the plan of its KV memory; its log says why")
        try:
            plan = _ask(pool, identity, timeout_s)
        except GmsError as error:
            ranks.all_gather_object(_Answer(None, error.message))
            raise
    else:
        try:
            plan = _ask(pool, identity, timeout_s)
        except BaseException:
            ranks.broadcast_object(False, src=0)
            raise
        ranks.broadcast_object(True, src=0)
    answers: list[_Answer] = ranks.all_gather_object(_Answer.of(plan))
    if refusals := [answer.refusal for answer in answers if answer.refusal]:
        raise ConnectionLost(f"another rank of this engine was not told the plan of its KV memory: {refusals[0]}")
    return plan, answers


def _ask(pool: RetainedPool, identity: Identity, timeout_s: float) -> KvPlan | None:
    def waiting(reason: str) -> None:
        log().info("waiting for the plan of pool %s, at most %.0f s: %s", pool.name, timeout_s, reason)

    try:
        planned = pool.plan(identity, timeout_s, waiting)
        return None if planned is None else KvPlan.decode(planned.plan)
    except GmsError as error:
        log().error("no plan of pool %s: %s", pool.name, error)
        raise
