"""TensorRT-LLM's HTTP server under the rules of `gms_core.failover.front_end`: it is called once its engine is the primary.

`trtllm-serve` binds a socket, makes the engine, and calls its `OpenAIServer`, which listens. Here that call waits, and gets another socket, to which
all engines of a lock can be bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from gms_core.engine_log import log
from gms_core.failover.cohort import GRACE_S, ApiPlace
from gms_core.failover.front_end.api_server import ApiServer
from gms_core.failover.front_end.engine import EngineCalls
from gms_core.failover.front_end.gate import Gate
from gms_core.failover.threads import in_thread
from gms_patches.apply import Applied, apply
from gms_patches.for_trtllm import SERVE
from gms_trtllm.engine_calls import TrtllmCalls
from gms_trtllm.failover import Begun, begun

BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""

Serve = Callable[..., Awaitable[None]]

_in_force: list[Applied] = []


def hold_servers() -> None:
    """Let servers of this process wait until their engine is promoted, if it fails over. Idempotent.

    Raises:
        EngineUnsupported: This TensorRT-LLM serves in a way that is not known. Nothing was changed.
    """
    _in_force.append(apply(SERVE, _holding))


def let_servers_go() -> None:
    """Undo it. Idempotent."""
    while _in_force:
        _in_force.pop().revert()


def _holding(original: Serve) -> Serve:
    async def __call__(self: Any, host: str, port: int, sockets: Any = None) -> None:  # noqa: N807 - its name
        engine = begun()
        if engine is None:
            await original(self, host, port, sockets=sockets)
        else:
            serve = partial(original, self, host, engine.port, sockets=[engine.listener])
            await _Held(engine, getattr(self, "generator", None) or self.llm, serve).run()

    return __call__


class _Http:
    """`HttpServer` over a coroutine that serves at a socket, until SIGTERM or SIGINT."""

    def __init__(self, engine: Begun, serve: Callable[[], Awaitable[None]]) -> None:
        self._listener, self._serve = engine.listener, serve
        self._gate = Gate(engine.listener, None, BACKLOG)
        self.serving: asyncio.Future[None] | None = None
        self.accepting: asyncio.Future[None] | None = None

    @property
    def address(self) -> str:
        """As `HttpServer.address`."""
        return self._gate.address

    async def prepared(self) -> None:
        """As `HttpServer.prepared`: the engine is."""

    async def rehearse(self, engine: EngineCalls) -> None:
        """As `HttpServer.rehearse`: TensorRT-LLM's own warm-up has gone through the engine."""

    def check_alone(self) -> None:
        """As `HttpServer.check_alone`."""
        self._gate.check_alone()

    async def open(self) -> None:
        """As `HttpServer.open`; comes back once the server accepts: it lets the socket listen once more, so that `shut` lasts from then on.

        Raises:
            Exception: The server has failed at once.
        """
        self._gate.open()
        self.serving, self.accepting = asyncio.ensure_future(self._serve()), asyncio.ensure_future(_accepted(self._listener))
        await asyncio.wait((self.serving, self.accepting), return_when=asyncio.FIRST_COMPLETED)
        if self.serving.done():
            self.serving.result()

    def shut(self) -> None:
        """As `HttpServer.shut`."""
        if self.serving is not None and self._listener.fileno() >= 0:  # the server closes it when it is told to end
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._gate.shut(())

    async def beat(self) -> None:
        """As `HttpServer.beat`: it is asked in the loop that serves."""

    def answering(self) -> int:
        """As `HttpServer.answering`: its server finishes them before it ends."""
        return 0

    def end(self) -> None:
        """As `HttpServer.end`."""
        os.kill(os.getpid(), signal.SIGTERM)


async def _accepted(listener: socket.socket) -> None:
    """Wait until somebody accepts at a socket: one who connects and says at once that this was all is hung up on by then, and not before."""
    loop = asyncio.get_running_loop()
    with socket.socket(listener.family, listener.type) as visitor:
        visitor.setblocking(False)
        with contextlib.suppress(ConnectionResetError):
            await loop.sock_connect(visitor, listener.getsockname())
            visitor.shutdown(socket.SHUT_WR)
            await loop.sock_recv(visitor, 1)


class _Held:
    """One server's way, from an engine that is up to its end."""

    def __init__(self, engine: Begun, llm: Any, serve: Callable[[], Awaitable[None]]) -> None:
        self._http = _Http(engine, serve)
        self._drain_timeout_s = engine.failover.drain_timeout_s
        grace_s = GRACE_S + self._drain_timeout_s
        self._api_server = ApiServer(
            TrtllmCalls(llm), self._http, ApiPlace(), engine.failover, connect_timeout_s=engine.gms.connect_timeout_s, grace_s=grace_s
        )

    async def run(self) -> None:
        """Take part in the engine's cohort and in the election, and serve.

        Raises:
            GmsError: The engine could not take part, or was ended by this error.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.set)  # the loop goes on to hear of them when the server has handlers of its own
        ended = asyncio.ensure_future(told.wait())
        coming: asyncio.Future[bool] | None = None
        try:
            await self._api_server.start()
            coming = asyncio.ensure_future(self._api_server.come_to_serve())
            await asyncio.wait((coming, ended), return_when=asyncio.FIRST_COMPLETED)
            if self._http.serving is not None:
                await asyncio.wait((self._http.serving, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if coming is not None:
                coming.cancel()
        await self._leave()

    async def _leave(self) -> None:
        """End in order: the servers know it before anything of the engine ends, and requests have their time."""
        await in_thread(self._api_server.depart, name="gms-depart")
        serving, accepting = self._http.serving, self._http.accepting
        if serving is not None and accepting is not None:
            await asyncio.wait((serving, accepting), return_when=asyncio.FIRST_COMPLETED)  # from then on it hears of signals
            accepting.cancel()
            self._http.shut()
            await self._drained(serving)
        await in_thread(self._api_server.close, name="gms-close")
        if self._api_server.failure is not None:
            raise self._api_server.failure
        if serving is not None and not serving.cancelled():
            serving.result()

    async def _drained(self, serving: asyncio.Future[None]) -> None:
        """Have the server end, and wait for the requests that it is answering, but not for ever."""
        if not serving.done():
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait((serving,), timeout=self._drain_timeout_s)
        if not serving.done():
            log().warning("the engine ends although requests are running: they had %g s", self._drain_timeout_s)
            serving.cancel()
            await asyncio.wait((serving,))
