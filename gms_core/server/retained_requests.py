"""Carries out requests on retained pools: plan, memory, hold, and what a holder's end means for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from gms_core.errors import GmsError, LeaseConflict, PoolNotFound, QuotaExceeded
from gms_core.layout import Allocation
from gms_core.protocol.messages import Done, Drop, Held, Hold, Plan, PlanDue, Planned, Provide, RetainedStatus
from gms_core.server.effects import Free, SessionId
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.retained import MakePlan, RetainedEffect, RetainedPool
from gms_core.server.seat import Claim, Seated
from gms_core.server.sessions import Session, check_wait

log = logging.getLogger(__name__)


class RetainedRequests:
    """The retained pools of one server.

    Args:
        sessions: All that are open.
        memory: The device's allocations.
        limits: Bounds on what clients may cost.
    """

    def __init__(self, sessions: Mapping[SessionId, Session], memory: Memory, limits: Limits) -> None:
        self.pools: dict[str, RetainedPool] = {}
        self._sessions = sessions
        self._memory = memory
        self._limits = limits

    async def plan(self, session: Session, request: Plan, claim: Claim, ended: asyncio.Event) -> None:
        """Answer with the plan, or with who has to make it."""
        check_wait(request.timeout_s, self._limits.wait_s)
        if request.pool not in self.pools and len(self.pools) >= self._limits.pools:
            raise QuotaExceeded(f"{self._limits.pools} retained pools exist already")
        pool = self.pools.setdefault(request.pool, RetainedPool(request.pool))
        try:
            self._apply(pool.ask_plan(claim, request.identity))
            answer = await session.answer(
                f"plan of pool {pool.name}", request.timeout_s, ended, lambda: self._apply(pool.withdraw(session.id, request.timeout_s))
            )
        finally:
            self._forget_if_idle(pool)
        if isinstance(answer, MakePlan):
            log.info("pool %s: %s plans it", pool.name, claim.label)
            await session.send(PlanDue(pool.name), ())
        else:
            await self._send_plan(session, pool)

    async def provide(self, session: Session, request: Provide, ended: asyncio.Event) -> None:
        """Create the memory of a pool as its planner says."""
        check_wait(request.timeout_s, self._limits.wait_s)
        if len(request.plan) > self._limits.metadata_bytes:
            raise QuotaExceeded(f"a plan of {len(request.plan)} bytes is over the limit of {self._limits.metadata_bytes}")
        pool = self._pool(request.pool)
        pool.check_provide(session.id)  # refuses who is not the planner, before any memory is made
        made = await self._memory.create(request.sizes, request.timeout_s, ended)
        allocations, offset = [], 0
        for identifier, owned in made:
            allocations.append(Allocation(identifier, offset, owned.size))
            offset += owned.size
        try:
            effects = pool.provide(session.id, request.plan, allocations)
        except LeaseConflict:
            self._memory.free(identifier for identifier, _ in made)  # the session ended meanwhile
            raise
        log.info("pool %s: %s has planned %d bytes", pool.name, pool.users[session.id].label, offset)
        self._apply(effects)
        session.answers.get_nowait()  # its own: it is answered here
        await self._send_plan(session, pool)

    async def hold(self, session: Session, request: Hold, *, first: bool, ended: asyncio.Event) -> None:
        """Grant the memory, once it is proven that nothing of the holder before is left."""
        check_wait(request.timeout_s, self._limits.wait_s)
        pool = self._pool(request.pool)
        self._apply(pool.hold(session.id, first=first))
        seated: Seated = await session.answer(
            f"pool {pool.name}", request.timeout_s, ended, lambda: self._apply(pool.withdraw(session.id, request.timeout_s))
        )
        log.info("pool %s: %s holds it, epoch %d", pool.name, pool.users[session.id].label, seated.number)
        await session.send(Held(pool.name, seated.number), ())

    async def drop(self, session: Session, request: Drop) -> None:
        """Free memory that nobody uses."""
        pool = self._pool(request.pool)
        self._apply(pool.drop())
        await session.send(Done(), ())

    def release(self, session: Session, pool: RetainedPool) -> None:
        """A living session gives up its use of a pool."""
        self._apply(pool.release(session.id))

    def closed(self, session: Session) -> None:
        """A session's connection has ended."""
        for pool in list(self.pools.values()):
            self._apply(pool.session_ended(session.id))
            self._forget_if_idle(pool)

    def cohort_ends(self, cohort: str, reason: str) -> None:
        """A cohort is being ended, or ends by itself."""
        for pool in self.pools.values():
            self._apply(pool.cohort_ends(cohort, reason))

    def cohort_gone(self, cohort: str) -> None:
        """Every process of a cohort has exited."""
        for pool in self.pools.values():
            self._apply(pool.cohort_gone(cohort))

    def fence_failed(self, cohort: str, error: GmsError) -> None:
        """A cohort cannot be ended."""
        for pool in self.pools.values():
            self._apply(pool.fence_failed(cohort, error))

    async def _send_plan(self, session: Session, pool: RetainedPool) -> None:
        await session.send(Planned(pool.name, pool.plan, pool.allocations, pool.seat.number), ())

    def _pool(self, name: str) -> RetainedPool:
        if name not in self.pools:
            raise PoolNotFound(f"there is no retained pool {name!r}")
        return self.pools[name]

    def _forget_if_idle(self, pool: RetainedPool) -> None:
        if pool.idle and self.pools.get(pool.name) is pool:
            del self.pools[pool.name]

    def _apply(self, effects: list[RetainedEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Free):
                self._memory.free(effect.ids)
            elif effect.session in self._sessions:
                self._sessions[effect.session].answers.put_nowait(effect)

    def status(self) -> tuple[RetainedStatus, ...]:
        """All retained pools as they are now."""
        return tuple(
            RetainedStatus(
                name=name,
                state=pool.state,
                epoch=pool.seat.number,
                identity=pool.identity.fields if pool.identity else {},
                allocations=len(pool.allocations),
                bytes=sum(allocation.size for allocation in pool.allocations),
                holder=pool.seat.holder.cohort if pool.seat.holder else "",
                users=tuple(sorted(pool.users)),
                waiting=tuple(claim.session for claim in pool.seat.queue),
            )
            for name, pool in sorted(self.pools.items())
        )
