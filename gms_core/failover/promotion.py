"""The way of a shadow to its service: wait for an order if it must, be elected, get the memory, be the primary."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from gms_core.errors import GmsError, PromotionFailed, RoleConflict
from gms_core.failover.links import LOST
from gms_core.failover.locks import FailoverLock
from gms_core.failover.process import EngineProcess
from gms_core.failover.status import EngineState, Promoted
from gms_core.failover.steps import Steps
from gms_core.failover.threads import in_thread

log = logging.getLogger(__name__)

LAST_GRACE_S = 10.0
"""Seconds that an engine whose promotion failed has to end by itself."""


class Promotion:
    """One engine's promotion, which happens at most once. Its process runs it in an event loop; `go` may be called from any thread.

    Attributes:
        state: Of the engine; it has to be standby when `run` begins, and is primary when `run` has returned.
    """

    def __init__(
        self,
        process: EngineProcess,
        state: EngineState,
        lock: FailoverLock,
        promote: Callable[[], Awaitable[Promoted]],
        depart: Callable[[float], None],
        *,
        autonomous: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        """Prepare a promotion.

        Args:
            process: Who stands for the engine.
            state: The engine's.
            lock: What elects it.
            promote: Makes every rank hold and map its memory; it may raise anything, which ends the engine.
            depart: Tells the servers that the engine ends within so many seconds, such as `Control.depart`; it may block.
            autonomous: Whether the engine goes for the lock by itself, or waits for `go`.
            timeout_s: Seconds that ``promote`` may take.
        """
        self.state = state
        self._process = process
        self._lock = lock
        self._promote = promote
        self._depart = depart
        self._autonomous = autonomous
        self._timeout_s = timeout_s
        self._ordered = threading.Event()
        self._wake: Callable[[], None] | None = None

    def go(self) -> None:
        """An operator wants this engine promoted: it goes for the lock if it waited for that. Thread-safe, idempotent."""
        self._ordered.set()
        wake = self._wake
        if wake is not None:
            wake()

    async def run(self) -> None:
        """Wait, be elected, get the memory: the engine is the primary when this returns, and its gate may open.

        If it raises, the engine is fenced and its process has to end; it has told the servers so already. If it is cancelled, the engine is fenced
        too, but departing is left to whoever cancelled it; a thread that waits for the lock goes on then, and ends with the process.

        Raises:
            PromotionFailed: It was elected, but its memory could not be had, or not in time.
            NotPromoted: It was ended before, by an order or its own shutdown.
            GmsError: It was ended before, by this error, such as the loss of its server.
        """
        try:
            await self._run(Steps(self.state))
        except asyncio.CancelledError:
            self.state.end("its promotion was cancelled")
            raise
        except Exception as error:
            await self._give_up(error)
            if isinstance(error, RoleConflict) and self.state.ended_by is not error:
                raise self.state.over() from error  # somebody ended the engine between two steps
            raise

    async def _give_up(self, error: Exception) -> None:
        if isinstance(error, LOST):
            self.state.server_lost(error)
        else:
            self.state.end(str(error), error if isinstance(error, GmsError) else None)
        await in_thread(lambda: self._depart(LAST_GRACE_S), name="gms-depart")

    async def _run(self, steps: Steps) -> None:
        if not self._autonomous:
            self.state.note("waits for gms failover promote")
            await steps.take(self._order())
        term = await steps.take(in_thread(lambda: self._lock.acquire(self._process, self.state.note), name="gms-elect"))
        self.state.elected(term)
        started = time.monotonic()
        promoted = await steps.take(self._memory())
        took = round(time.monotonic() - started, 4)
        self.state.promoted(replace(promoted, kv={**promoted.kv, "promotion_s": took}))

    async def _order(self) -> None:
        loop, ordered = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(ordered.set)

        self._wake = wake
        if not self._ordered.is_set():
            await ordered.wait()

    async def _memory(self) -> Promoted:
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await self._promote()
        except Exception as error:
            if limit.expired():
                raise PromotionFailed(f"{self.state.engine} was elected, but did not have its memory within {self._timeout_s:g} s") from error
            raise PromotionFailed(f"{self.state.engine} was elected, but could not get its memory: {error}") from error
