"""Carries out requests on retained pools: plan, memory, hold, and what a holder's end means for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from gms_core.errors import GmsError, InvalidArgument, PoolNotFound, QuotaExceeded
from gms_core.layout import Allocation
from gms_core.protocol.messages import AwaitWhole, Done, Drop, Held, Hold, Plan, PlanDue, Planned, Provide, RetainedStatus
from gms_core.server.accounts import Accounts
from gms_core.server.effects import Free, SessionId
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.observer import Tell, tell_nobody
from gms_core.server.pool_changes import RetainedView, look_retained, retained_changes
from gms_core.server.records import RetainedRecord
from gms_core.server.retained import GrantHold, MakePlan, RetainedEffect, RetainedPool
from gms_core.server.seat import Claim
from gms_core.server.sessions import Session, check_wait


class RetainedRequests:
    """The retained pools of one server.

    Args:
        sessions: All that are open.
        memory: The device's allocations.
        limits: Bounds on what clients may cost.
        accounts: Who has what, and may have more.
        free: Gives allocations up that were part of a pool.
        changed: Called when pools may have changed, with the sessions whose use of them may have.
        tell: Is told of what happens.
    """

    def __init__(
        self,
        sessions: Mapping[SessionId, Session],
        memory: Memory,
        limits: Limits,
        accounts: Accounts,
        *,
        free: Callable[[Sequence[int]], None],
        changed: Callable[[Sequence[SessionId]], None] = lambda _: None,
        tell: Tell = tell_nobody,
    ) -> None:
        self.pools: dict[str, RetainedPool] = {}
        self._sessions = sessions
        self._memory = memory
        self._limits = limits
        self._accounts = accounts
        self._free, self._changed, self._tell = free, changed, tell
        self._seen: dict[str, RetainedView] = {}

    def resume(self, records: Mapping[str, RetainedRecord], *, with_memory: bool) -> None:
        """Take pools over from the server before."""
        for name, record in records.items():
            pool = self.pools[name] = RetainedPool.of(name, record, with_memory=with_memory)
            self._seen[name] = look_retained(pool)

    def resume_user(self, name: str, claim: Claim) -> None:
        """A session that may come back uses a pool."""
        if name in self.pools:
            self.pools[name].resume_user(claim)

    def used_by(self, session: SessionId) -> tuple[str, ...]:
        """Names of the pools that a session uses."""
        return tuple(name for name, pool in self.pools.items() if session in pool.users)

    def records(self) -> dict[str, RetainedRecord]:
        """All pools, for the next server."""
        return {name: pool.record() for name, pool in self.pools.items()}

    async def plan(self, session: Session, request: Plan, claim: Claim, ended: asyncio.Event) -> None:
        """Answer with the plan, or with who has to make it."""
        check_wait(request.timeout_s, self._limits.wait_s)
        if request.pool not in self.pools and len(self.pools) >= self._limits.pools:
            raise QuotaExceeded(f"{self._limits.pools} retained pools exist already")
        pool = self.pools.setdefault(request.pool, RetainedPool(request.pool))
        if session.repeats and session.id in pool.users:
            await self._send_plan(session, pool)
            return
        if session.repeats and pool.planner is not None and pool.planner.claim.session == session.id:
            await session.send(PlanDue(pool.name), ())
            return
        try:
            self._accounts.check_joins(pool.name, session.id)
            self._apply(pool, pool.ask_plan(claim, request.identity))
            answer = await session.answer(
                f"plan of pool {pool.name}", request.timeout_s, ended, lambda: self._apply(pool, pool.withdraw(session.id, request.timeout_s))
            )
        finally:
            self._forget_if_idle(pool)
        if isinstance(answer, MakePlan):
            await session.send(PlanDue(pool.name), ())
        else:
            await self._send_plan(session, pool)

    async def provide(self, session: Session, request: Provide, ended: asyncio.Event) -> None:
        """Create the memory of a pool as its planner says."""
        check_wait(request.timeout_s, self._limits.wait_s)
        if len(request.plan) > self._limits.metadata_bytes:
            raise QuotaExceeded(f"a plan of {len(request.plan)} bytes is over the limit of {self._limits.metadata_bytes}")
        pool = self._pool(request.pool)
        if session.repeats and session.id in pool.users:
            await self._send_plan(session, pool)
            return
        pool.check_provide(session.id)  # refuses who is not the planner, before any memory is made
        if any(not 0 <= index < len(request.sizes) for index in request.front) or len(set(request.front)) != len(request.front):
            raise InvalidArgument(f"the front {list(request.front)[:5]} does not name allocations of the plan, each once")
        sizes = (*request.sizes, *(request.sizes[index] for index in request.front))
        self._accounts.check_plan(session.peer.uid, pool.name, request.plan)
        with self._accounts.memory(session.peer.uid, pool.name, sizes):
            made = await session.memory(self._memory, sizes, request.timeout_s, ended, pool.name)
            try:
                allocations, offset = [], 0
                for identifier, owned in made[: len(request.sizes)]:
                    allocations.append(Allocation(identifier, offset, owned.size))
                    offset += owned.size
                spares = [
                    Allocation(identifier, allocations[index].offset, owned.size)
                    for index, (identifier, owned) in zip(request.front, made[len(request.sizes) :], strict=True)
                ]
                effects = pool.provide(session.id, request.plan, allocations, spares)
            except BaseException:
                self._memory.free(identifier for identifier, _ in made)  # such as when the engine began to end meanwhile: it plans nothing any more
                raise
        self._accounts.planned(session.peer.uid, pool.name)
        self._apply(pool, effects)
        session.answers.get_nowait()  # its own: it is answered here
        await self._send_plan(session, pool)

    async def hold(self, session: Session, request: Hold, *, first: bool, ended: asyncio.Event) -> None:
        """Grant the memory, once it is proven that nothing of the holder before is left."""
        check_wait(request.timeout_s, self._limits.wait_s)
        pool = self._pool(request.pool)
        if session.repeats and pool.seat.holder is not None and pool.seat.holder.session == session.id:
            await session.send(Held(pool.name, pool.seat.number, pool.turn, pool.unproven is None), ())
            return
        self._apply(pool, pool.hold(session.id, first=first, bridge=request.bridge))
        granted: GrantHold = await session.answer(
            f"pool {pool.name}", request.timeout_s, ended, lambda: self._apply(pool, pool.withdraw(session.id, request.timeout_s))
        )
        await session.send(Held(pool.name, granted.epoch, granted.turn, granted.whole), ())

    async def await_whole(self, session: Session, request: AwaitWhole, ended: asyncio.Event) -> None:
        """Answer once the holder of a bridge may map the rest."""
        check_wait(request.timeout_s, self._limits.wait_s)
        pool = self._pool(request.pool)
        self._apply(pool, pool.await_whole(session.id))
        await session.answer(
            f"the rest of pool {pool.name}", request.timeout_s, ended, lambda: self._apply(pool, pool.withdraw(session.id, request.timeout_s))
        )
        await session.send(Done(), ())

    async def drop(self, session: Session, request: Drop) -> None:
        """Free memory that nobody uses."""
        pool = self._pool(request.pool)
        if not (session.repeats and pool.identity is None):
            self._apply(pool, pool.drop())
        await session.send(Done(), ())

    def prefer(self, cohort: str) -> None:
        """An operator wants this engine to be the next one."""
        for pool in self.pools.values():
            self._apply(pool, pool.prefer(cohort))

    def release(self, session: Session, pool: RetainedPool) -> None:
        """A living session gives up its use of a pool."""
        self._changed([session.id])
        self._apply(pool, pool.release(session.id))

    def closed(self, session: SessionId) -> None:
        """A session's connection has ended."""
        for pool in list(self.pools.values()):
            self._apply(pool, pool.session_ended(session))
            self._forget_if_idle(pool)

    def cohort_ends(self, cohort: str, reason: str) -> None:
        """A cohort is being ended, or ends by itself."""
        for pool in self.pools.values():
            self._apply(pool, pool.cohort_ends(cohort, reason))

    def cohort_mute(self, cohort: str) -> None:
        """A cohort that is ending can answer nobody any more."""
        for pool in self.pools.values():
            self._apply(pool, pool.cohort_mute(cohort))

    def cohort_gone(self, cohort: str) -> None:
        """Every process of a cohort has exited."""
        for pool in self.pools.values():
            self._apply(pool, pool.cohort_gone(cohort))

    def fence_failed(self, cohort: str, error: GmsError, final: bool) -> None:
        """A cohort has not been ended, and cannot be if that is final."""
        for pool in self.pools.values():
            self._apply(pool, pool.fence_failed(cohort, error, final=final))

    async def _send_plan(self, session: Session, pool: RetainedPool) -> None:
        await session.send(Planned(pool.name, pool.plan, pool.allocations, pool.seat.number, pool.spares), ())

    def _pool(self, name: str) -> RetainedPool:
        if name not in self.pools:
            raise PoolNotFound(f"there is no retained pool {name!r}")
        return self.pools[name]

    def _forget_if_idle(self, pool: RetainedPool) -> None:
        if pool.idle and self.pools.get(pool.name) is pool:
            del self.pools[pool.name]
            self._seen.pop(pool.name, None)

    def _apply(self, pool: RetainedPool, effects: list[RetainedEffect]) -> None:
        self._changed([effect.session for effect in effects if not isinstance(effect, Free)])
        if self.pools.get(pool.name) is pool:  # one that is forgotten may still refuse somebody
            before, seen = self._seen.get(pool.name, RetainedView()), look_retained(pool)
            self._seen[pool.name] = seen
            for kind, facts in retained_changes(before, seen):
                self._tell(kind, pool.name, **facts)
        for effect in effects:
            if isinstance(effect, Free):
                self._free(effect.ids)
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
                allocations=len(pool.allocations) + len(pool.spares),
                bytes=sum(allocation.size for allocation in (*pool.allocations, *pool.spares)),
                holder=pool.seat.holder.cohort if pool.seat.holder else "",
                users=tuple(sorted(pool.users)),
                waiting=tuple(claim.session for claim in pool.seat.queue),
            )
            for name, pool in sorted(self.pools.items())
        )
