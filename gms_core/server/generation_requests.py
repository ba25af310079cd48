"""Carries out requests about generations of published pools: pins, rollbacks, and readers that move to another one."""

from __future__ import annotations

import asyncio

from gms_core.events import Kind
from gms_core.protocol.generations import (
    AwaitGeneration,
    BeginMove,
    DropGeneration,
    EndMove,
    GenerationRequest,
    Newer,
    Pin,
    Rollback,
    RolledBack,
    Unpin,
)
from gms_core.protocol.messages import Done, ReadGranted
from gms_core.server.accounts import Accounts
from gms_core.server.grants import News
from gms_core.server.limits import Limits, check_metadata, check_pins
from gms_core.server.observer import Tell
from gms_core.server.published_requests import PublishedRequests
from gms_core.server.sessions import Session, check_wait


class GenerationRequests:
    """The generations of a server's published pools.

    Args:
        published: The pools.
        limits: Bounds on what clients may cost.
        accounts: Who has what.
        tell: Is told of what happens.
    """

    def __init__(self, published: PublishedRequests, limits: Limits, accounts: Accounts, tell: Tell) -> None:
        self._published = published
        self._limits = limits
        self._accounts = accounts
        self._tell = tell

    async def handle(self, session: Session, request: GenerationRequest, ended: asyncio.Event) -> None:
        """Carry out one request and send its reply.

        Raises:
            GmsError: The request is refused.
        """
        match request:
            case AwaitGeneration():
                await self._await(session, request, ended)
            case BeginMove():
                await self._begin_move(session, request)
            case EndMove():
                self._end_move(session, request)
                await session.send(Done(), ())
            case Rollback():
                await self._rollback(session, request)
            case Pin() | Unpin() | DropGeneration():
                self._keep_or_drop(session, request)
                await session.send(Done(), ())

    async def _await(self, session: Session, request: AwaitGeneration, ended: asyncio.Event) -> None:
        check_wait(request.timeout_s, self._limits.wait_s)
        pool = self._published.find(request.pool, create=True)
        try:
            self._accounts.check_joins(pool.name, session.id)
            self._published.apply(pool, pool.watch(session.id, request.after))
            told: News = await session.answer(
                pool.name, request.timeout_s, ended, lambda: self._published.apply(pool, pool.withdraw(session.id, request.timeout_s))
            )
        finally:
            self._published.forget_if_idle(pool)
        layout = told.layout
        await session.send(Newer(pool.name, layout.generation, layout.digest, layout.identity, layout.size, layout.extent), ())

    async def _begin_move(self, session: Session, request: BeginMove) -> None:
        check_metadata(self._limits, request.identity)
        pool = self._published.find(request.pool)
        begun = pool.generations.moving.get(session.id) if session.repeats else None
        if begun is not None:
            layout = pool.generations.get(begun)
        else:
            layout = pool.begin_move(session.id, request.identity, request.generation).layout
            self._published.changed(pool, session.id)
        await session.send(ReadGranted(pool.name, layout), ())

    def _end_move(self, session: Session, request: EndMove) -> None:
        pool = self._published.find(request.pool)
        before, effects = pool.readers.get(session.id), pool.end_move(session.id, request.generation)
        if before is not None and before != request.generation:
            facts = {"session": session.id, "pid": session.peer.pid, "generation": request.generation, "before": before}
            self._tell(Kind.POOL_LEASE_MOVED, pool.name, **facts)
        self._published.apply(pool, effects)
        self._published.changed(pool, session.id)

    async def _rollback(self, session: Session, request: Rollback) -> None:
        pool = self._published.find(request.pool)
        done = pool.rollbacks.get(session.id) if session.repeats else None
        if done is None or (done.to, done.expected, done.number) != (request.to, request.expected, request.number):
            self._published.apply(pool, pool.rollback(session.id, request.to, request.expected, request.number))
            done = pool.rollbacks[session.id]
            self._accounts.rolled_back(pool.name, done.to, done.generation)
            self._published.changed(pool, session.id)
        await session.send(RolledBack(pool.name, done.generation), ())

    def _keep_or_drop(self, session: Session, request: Pin | Unpin | DropGeneration) -> None:
        pool = self._published.find(request.pool)
        there_was = 0 < request.generation <= pool.generations.last
        if session.repeats and there_was and not isinstance(request, Pin) and pool.generations.find(request.generation) is None:
            return  # that was its doing
        match request:
            case Pin():
                if request.generation not in pool.generations.pins:
                    check_pins(self._limits, pool.name, pool.generations.pins)
                self._published.apply(pool, pool.pin(request.generation), session.id)
            case Unpin():
                self._published.apply(pool, pool.unpin(request.generation), session.id)
            case DropGeneration():
                effects = pool.drop(request.generation)
                self._tell(Kind.POOL_GENERATION_DROPPED, pool.name, session=session.id, pid=session.peer.pid, generation=request.generation)
                self._published.apply(pool, effects)
