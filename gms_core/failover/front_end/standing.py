"""How an API server comes to serve: the engine's first one is elected and makes all ranks take the KV memory over; its siblings follow it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from gms_core.engine_log import log
from gms_core.errors import EngineFailed, GmsError, PromotionFailed
from gms_core.failover.control import Control
from gms_core.failover.follower import Follower
from gms_core.failover.front_end.engine import EngineCalls, HttpServer
from gms_core.failover.front_end.timeline import Clock
from gms_core.failover.locks import FailoverLock
from gms_core.failover.notifications import Notifier
from gms_core.failover.process import EngineProcess
from gms_core.failover.promotion import Promotion
from gms_core.failover.status import EngineState, Promoted, RoleChange
from gms_core.failover.steps import Steps
from gms_core.failover.threads import from_thread

if TYPE_CHECKING:
    from gms_core.engine_config import FailoverConfig
    from gms_core.failover.front_end.status_page import StatusPage

PROVEN_AGAIN_S = 0.01
"""Seconds between two questions to the ranks whether they may have the rest of their KV memory, at first. Each may cost a step of the scheduler."""
PROVEN_SELDOM_S = 0.25
"""The same after a while, for a process that does not exit."""
AWAKE_AGAIN_S = 0.5
"""The same while they could have it, and sleep."""
NOTIFY_S = 5.0
"""Seconds that the last notifications may take before the process ends."""


class Standing(Protocol):
    """An API server's part in its engine."""

    def start(self, *, on_demote: Callable[[], None], on_lost: Callable[[GmsError], None]) -> None:
        """Join the servers. Blocks for a moment; the callbacks run in threads.

        Raises:
            GmsError: A server is not there, or does not want this process.
        """

    async def become_primary(self) -> None:
        """Wait until this process may serve.

        Raises:
            GmsError: It never will: the engine was ended before.
        """

    def gate_opened(self) -> None:
        """Clients can connect."""

    async def become_whole(self) -> None:
        """Come back once the engine has all of its KV memory.

        Raises:
            GmsError: It never will.
        """

    def depart(self, grace_s: float) -> None:
        """Tell the servers that the whole engine ends within so many seconds."""

    def close(self) -> None:
        """The engine has let go of its memory: finish what else there is to do. Blocks for some seconds at most."""


async def beat(engine: EngineCalls, http: HttpServer) -> None:
    """Come back once the HTTP server and every rank have answered that they make progress.

    Raises:
        GmsError: A rank does not.
    """
    await http.beat()
    stalled = [rank for rank, moves in enumerate(await engine.beat()) if not moves]
    if stalled:
        raise GmsError(f"the device of rank {', '.join(map(str, stalled))} has not finished what it was given before the last look")


class Leader:
    """The engine's first API server."""

    def __init__(
        self,
        process: EngineProcess,
        state: EngineState,
        failover: FailoverConfig,
        lock: FailoverLock,
        engine: EngineCalls,
        http: HttpServer,
        *,
        rejoin: Callable[[], None],
    ) -> None:
        """Prepare, in the event loop; `start` connects.

        Args:
            process: This one.
            state: The engine's.
            failover: How it fails over.
            lock: What elects it.
            engine: Its ranks, and what schedules them.
            http: Of this process.
            rejoin: Makes the engine's other processes join a server again that was lost; called in a thread.
        """
        self._state = state
        self._failover = failover
        self._engine = engine
        self._http = http
        self._clock = Clock()
        state.listen(self._changed)
        self._notifier = Notifier(state, on_promoted=failover.on_promoted, webhook=failover.webhook)
        loop = asyncio.get_running_loop()
        check = from_thread(loop, lambda: beat(engine, http)) if process.deadline_s else None
        self._control = Control(process, state, lock, check=check, on_found=lambda _: rejoin())
        self._promotion = Promotion(
            process,
            state,
            lock,
            self._promote,
            self._control.depart,
            autonomous=failover.autonomous,
            timeout_s=failover.promotion_timeout_s,
        )
        self._page = _status_page(state, failover.status_address) if failover.status_address else None
        self._bridges = False

    def start(self, *, on_demote: Callable[[], None], on_lost: Callable[[GmsError], None]) -> None:
        """As `Standing.start`."""
        self._control.start(on_promote=self._promotion.go, on_demote=on_demote, on_lost=on_lost)

    async def become_primary(self) -> None:
        """As `Standing.become_primary`. With a bridge, the scheduler gives out its blocks alone from here on, until `become_whole`."""
        steps = Steps(self._state)
        ranks = await steps.take(self._engine.stand_by())
        if reasons := [f"rank {rank}: {stood.refusal}" for rank, stood in enumerate(ranks) if stood.refusal]:
            raise EngineFailed(f"this engine cannot stand by for another: {'; '.join(reasons)}", hint="Start it again.")
        if self._failover.bridge_bytes != 0 and (blocks := min(stood.blocks for stood in ranks)):
            self._bridges = await steps.take(self._engine.withhold(blocks))
        self._state.ready()
        await self._promotion.run()

    def gate_opened(self) -> None:
        """As `Standing.gate_opened`."""
        told = self._state.snapshot()
        timeline = self._clock.listening(told.engine, told.term, told.epochs)
        self._notifier.gate_opened()
        log().info("%s serves at %s, %.1f ms after its election [%s]", told.engine, told.address, timeline.listening_ms, timeline.line())

    async def become_whole(self) -> None:
        """As `Standing.become_whole`."""
        pause_s = PROVEN_AGAIN_S
        while self._bridges:
            step, reason = await self._engine.give_all()
            if step == "failed":
                raise PromotionFailed(f"this engine serves from the first blocks of its KV memory, and can never have the rest: {reason}")
            self._bridges = step != "whole"
            await asyncio.sleep(AWAKE_AGAIN_S if step == "asleep" else pause_s)
            pause_s = min(PROVEN_SELDOM_S, 1.05 * pause_s)

    def depart(self, grace_s: float) -> None:
        """As `Standing.depart`."""
        self._control.depart(grace_s)

    def close(self) -> None:
        """As `Standing.close`."""
        self._notifier.close(NOTIFY_S)
        if self._page is not None:
            self._page.close()

    async def _promote(self) -> Promoted:
        asked = time.monotonic()
        # No rank may begin with its bridge if the scheduler gives out more than that.
        ranks = await self._engine.promote(self._failover.promotion_timeout_s, self._bridges)
        if self._failover.gate == "port":
            self._http.check_alone()
        return self._clock.promoted(asked, ranks)

    def _changed(self, change: RoleChange) -> None:
        if change.role == "promoting":
            self._clock.elected()


def _status_page(state: EngineState, address: str) -> StatusPage:
    from gms_core.failover.front_end.status_page import StatusPage

    return StatusPage(state, address)


class Sibling:
    """A further API server of the engine."""

    def __init__(self, process: EngineProcess, state: EngineState, engine: EngineCalls, http: HttpServer) -> None:
        """Prepare, in the event loop; `start` connects.

        Args:
            process: This one.
            state: This process's own.
            engine: Its ranks, which are asked for their progress.
            http: Of this process, which is asked for its own.
        """
        self._process = process
        self._state = state
        loop = asyncio.get_running_loop()
        check = from_thread(loop, lambda: beat(engine, http)) if process.deadline_s else None
        self._follower = Follower(process, state, check=check)

    def start(self, *, on_demote: Callable[[], None], on_lost: Callable[[GmsError], None]) -> None:
        """As `Standing.start`."""
        self._follower.start(on_demote=on_demote, on_lost=on_lost)

    async def become_primary(self) -> None:
        """As `Standing.become_primary`."""
        self._state.ready()
        await Steps(self._state).take(self._follower.follow())

    def gate_opened(self) -> None:
        """As `Standing.gate_opened`."""
        log().info("%s of %s serves", self._process.name, self._process.engine)

    async def become_whole(self) -> None:
        """As `Standing.become_whole`: that is the first API server's business."""

    def depart(self, grace_s: float) -> None:
        """As `Standing.depart`: all API servers end at once, and whichever is the first to go must have said so."""
        self._follower.depart(grace_s)

    def close(self) -> None:
        """As `Standing.close`."""
