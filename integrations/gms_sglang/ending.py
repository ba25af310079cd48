"""How SGLang's main process ends: in order, when somebody asks it to, or at once, when its engine cannot go on.

SGLang's own orderly end looks every five seconds whether it was asked for. So it is begun here, and everything after that is SGLang's. A crash is
none of this: its engine does not depart, and is fenced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from gms_core.engine_log import log
from gms_core.failover.threads import in_thread

DEPART_S = 3.0
"""Seconds for telling the servers: one that hangs must not keep the engine from ending."""


class Ending:
    """The end of one engine. It belongs to the event loop that it is made in.

    Attributes:
        begun: Whether the engine ends.
    """

    def __init__(self, server: uvicorn.Server) -> None:
        """Prepare.

        Args:
            server: The HTTP server.
        """
        self.begun = False
        self._server = server
        self._manager: Any = None
        self._begin: Callable[[], None]
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.create_future()
        self._work: asyncio.Task[None] | None = None

    def take_signals(self, depart: Callable[[], None], shut: Callable[[], None], close: Callable[[], None]) -> None:
        """From the start of the server on, have SIGTERM and SIGINT end the engine in order.

        Args:
            depart: Tells the servers that the engine ends, from where on requests are refused; it may block.
            shut: Ends the listening. While others can come, those that run would never be the last.
            close: Waits until all is told that was to be told; it may block. Called where SGLang's end comes back to nobody.
        """

        def begin() -> None:
            if not self.begun:
                self.begun = True
                self._work = self._loop.create_task(self._end_in_order(depart, shut, close))

        def handle_exit(_: int, __: FrameType | None) -> None:
            self._loop.call_soon_threadsafe(begin)

        self._begin = begin
        self._server.handle_exit = handle_exit  # type: ignore[assignment, method-assign]

    def take_signals_of(self, manager: Any) -> None:
        """The same where SGLang takes the signals from the HTTP server, once it answers. To be called after `take_signals`, and before that.

        Args:
            manager: SGLang's ``TokenizerManager``.
        """
        begin = self._begin

        class OrderlySignals(manager.signal_handler_class):  # type: ignore[misc]
            """SGLang's, but for the orderly end."""

            def sigterm_handler(self, *_: Any, **__: Any) -> None:
                begin()

        self._manager = manager
        manager.signal_handler_class = OrderlySignals

    def at_once(self) -> None:
        """Have the process stop to serve now."""
        self.begun = True
        if not self._now.done():
            self._now.set_result(None)

    async def unless_ended(self, serving: Awaitable[None]) -> bool:
        """Serve until that is over, or until the end has come to where it can be cut short.

        Args:
            serving: Uvicorn's own way, which knows no end before it listens.

        Returns:
            Whether it was cut short.
        """
        task = asyncio.ensure_future(serving)
        await asyncio.wait((task, self._now), return_when=asyncio.FIRST_COMPLETED)
        cut_short = not task.done()
        if cut_short:
            task.cancel()
            await asyncio.wait((task,))
        if not task.cancelled():
            task.result()
        return cut_short

    async def _end_in_order(self, depart: Callable[[], None], shut: Callable[[], None], close: Callable[[], None]) -> None:
        try:
            await self._end(depart, shut, close)
        except Exception:  # noqa: BLE001 - it is logged, and the process ends all the same
            log().exception("this engine could not end in order")
            self.at_once()

    async def _end(self, depart: Callable[[], None], shut: Callable[[], None], close: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(DEPART_S):
                await in_thread(depart, name="gms-depart")
        except TimeoutError:
            log().warning("a server was not told within %g s that this engine ends", DEPART_S)
        if not self._server.started:
            self.at_once()
            return
        shut()
        await self.stop(close)

    async def stop(self, close: Callable[[], None]) -> None:
        """Nobody can come any more: finish the requests that run, and end the engine, as SGLang does.

        Args:
            close: As for `take_signals`.
        """
        if not hasattr(self._manager, "_server_stop_hook"):  # 0.5.16 does not stop the server in the end: it kills this process
            await in_thread(close, name="gms-close")
        self._manager.gracefully_exit = True
        await self._manager.sigterm_watchdog()
