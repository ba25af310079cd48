"""SGLang's HTTP server under the rules of `gms_core.failover.front_end`.

SGLang prepares its FastAPI and gives it to uvicorn, which starts it, and listens once it is started. Here the app is started, and its word of that is
kept back until the engine is the primary; uvicorn gets a socket that is bound already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from sglang.srt.entrypoints.http_server import app

from gms_core.engine_log import log
from gms_core.errors import EngineUnsupported
from gms_core.failover.cohort import GRACE_S
from gms_core.failover.front_end.api_server import ApiServer
from gms_core.failover.front_end.engine import EngineCalls
from gms_core.failover.front_end.gate import Gate, ListenLast
from gms_core.failover.front_end.rehearsal import rehearse
from gms_core.failover.http import App, HoldMiddleware, wrap_app
from gms_core.failover.status import EngineState
from gms_core.failover.threads import in_thread
from gms_sglang.ending import Ending
from gms_sglang.engine_calls import SglangCalls
from gms_sglang.failover import Begun
from gms_sglang.part import Part, part_of
from gms_sglang.scheduler_rpc import SchedulerRpc
from gms_sglang.warm_up import WarmUp

BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""
APP_S = 5.0
"""Seconds that SGLang's app has to end, where it has not served."""
_Serve = Callable[..., Awaitable[None]]


class SglangHttp:
    """`HttpServer` over SGLang's ``FastAPI`` and its uvicorn, whose listening socket is a gate's."""

    def __init__(self, server: uvicorn.Server, manager: Callable[[], Any], gate: Gate, part: Part, ending: Ending) -> None:
        """Prepare; `hold` is next.

        Args:
            server: About to serve SGLang's app.
            manager: SGLang's ``TokenizerManager``, once the app is started.
            gate: Of the server's socket.
            part: What is served.
            ending: Ends the process.
        """
        self._server = server
        self._manager = manager
        self._gate = gate
        self._part = part
        self._ending = ending
        self._listens = False
        self._inner: App

    def hold(self, state: EngineState) -> None:
        """Put the gate around the app, before it is started."""
        self._inner = wrap_app(app, lambda inner: ListenLast(HoldMiddleware(inner, state), self._gate))

    @property
    def address(self) -> str:
        """As `HttpServer.address`."""
        return self._gate.address

    async def prepared(self) -> None:
        """As `HttpServer.prepared`."""
        await self._gate.reached()
        manager = self._manager()
        self._ending.take_signals_of(manager)
        manager.auto_create_handle_loop()  # signals are for the engine from now on, and not for the HTTP server alone

    async def rehearse(self, engine: EngineCalls) -> None:
        """As `HttpServer.rehearse`."""
        await rehearse(app, self._inner, engine, self._part.keys, self._part.requests)

    def check_alone(self) -> None:
        """As `HttpServer.check_alone`."""
        self._gate.check_alone()

    async def open(self) -> None:
        """As `HttpServer.open`."""
        self._gate.open()
        await self._gate.served_by(self._server)
        self._listens = True

    def shut(self) -> None:
        """As `HttpServer.shut`. Idempotent: a demoted engine has done so when it is told to end."""
        if self._listens:
            self._listens = False
            self._gate.shut(getattr(self._server, "servers", ()))

    async def beat(self) -> None:
        """As `HttpServer.beat`: it is asked in the loop that serves."""

    def answering(self) -> int:
        """As `HttpServer.answering`."""
        return len(self._server.server_state.tasks)

    def end(self) -> None:
        """As `HttpServer.end`."""
        self.shut()
        self._ending.at_once()


@contextlib.contextmanager
def held(engine: Begun, listener: socket.socket, manager: Any, port_args: Any) -> Iterator[None]:
    """While it lasts, uvicorn serves SGLang's app under the rules of failover.

    Args:
        engine: As this process has begun it.
        listener: Bound to its address.
        manager: SGLang's ``TokenizerManager``.
        port_args: Its ``PortArgs``.

    Raises:
        EngineUnsupported: SGLang has served by other means.
        GmsError: The engine could not take part, or was ended by this error.
    """
    original: _Serve = uvicorn.Server.serve
    begun: list[Serving] = []

    @functools.wraps(original)
    async def serve(server: uvicorn.Server, *args: Any, **kwargs: Any) -> None:
        if server.config.app is not app:  # such as the status page
            await original(server, *args, **kwargs)
            return
        begun.append(MainServing(part_of(engine, port_args), listener, server, engine.warm_up, manager))
        await begun[0].run(lambda: original(server, [listener]))

    uvicorn.Server.serve = serve  # type: ignore[assignment, method-assign]
    try:
        with contextlib.suppress(SystemExit):  # an older SGLang lets uvicorn say so if it never came to listen
            yield
    finally:
        uvicorn.Server.serve = original  # type: ignore[assignment, method-assign]
        engine.warm_up.settle(False)
    if not begun:
        raise EngineUnsupported("failover: SGLang has not used the HTTP server that could be held", hint="`gms patches check` shows what differs.")
    begun[0].check()


class Serving(ABC):
    """One server's way, from an engine that is up to its end. What depends on the process is in the methods that derived classes have."""

    def __init__(self, part: Part, listener: socket.socket, server: uvicorn.Server, warm_up: WarmUp) -> None:
        """Prepare.

        Args:
            part: What this process serves.
            listener: Bound to the engine's address.
            server: About to serve SGLang's app.
            warm_up: SGLang's own.
        """
        self._part, self._listener, self._server, self._warm_up = part, listener, server, warm_up
        self._api_server: ApiServer
        self._ended = False

    @abstractmethod
    def manager(self) -> Any:
        """SGLang's ``TokenizerManager`` of this process, once the app is started."""

    @abstractmethod
    def connect(self) -> SglangCalls:
        """The engine's other processes. Called in the event loop."""

    def ending(self) -> Ending:
        """How this process ends. Called in the event loop."""
        return Ending(self._server)

    def watch(self, state: EngineState) -> None:  # noqa: B027 - most have nothing to look for
        """Look at the engine's state. Called before anything of it changes."""

    async def run(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Take part in the engine's cohort and in the election, and serve as SGLang does once the gate is open.

        Args:
            serve: Uvicorn's own; it returns when the server has to end.

        Raises:
            GmsError: The engine could not take part, or was ended by this error.
        """
        part, warm_up = self._part, self._warm_up
        gate = Gate(self._listener, None, BACKLOG)
        ending = self.ending()
        http = SglangHttp(self._server, self.manager, gate, part, ending)
        calls = self.connect()
        grace_s = GRACE_S + part.failover.drain_timeout_s
        api_server = ApiServer(calls, http, part.place, part.failover, connect_timeout_s=part.gms.connect_timeout_s, grace_s=grace_s)
        self._api_server = api_server
        self.watch(api_server.state)
        http.hold(api_server.state)
        ending.take_signals(api_server.depart, http.shut, api_server.close)
        coming: asyncio.Future[None] | None = None
        try:
            await api_server.start()
            coming = asyncio.ensure_future(self._come_to_serve(api_server))
            cut_short = await ending.unless_ended(serve())
            if cut_short:
                warm_up.settle(False)
                gate.let_go()
                await self._end_app()
        finally:
            self._ended = ending.begun
            warm_up.settle(False)
            gate.let_go()
            if coming is not None:
                coming.cancel()
            calls.close()
        if ending.begun:
            await in_thread(api_server.close, name="gms-close")

    def check(self) -> None:
        """Once nothing serves any more: raise what the engine was ended by, if it was an error."""
        if self._api_server.failure is not None:
            raise self._api_server.failure
        if not self._ended and not self._server.started:
            raise SystemExit(1)  # what SGLang's app would not start for is in its log

    async def _end_app(self) -> None:
        """Let SGLang's app end what it has begun at its start, as uvicorn does for one that has served."""
        lifespan = getattr(self._server, "lifespan", None)
        if lifespan is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(APP_S):
                    await lifespan.shutdown()

    async def _come_to_serve(self, api_server: ApiServer) -> None:
        self._warm_up.settle(await api_server.come_to_serve())
        if api_server.failure is None:
            log().debug("%s has come to its gate", api_server.state.engine)


class MainServing(Serving):
    """That of an engine whose main process serves by itself."""

    def __init__(self, part: Part, listener: socket.socket, server: uvicorn.Server, warm_up: WarmUp, manager: Any) -> None:
        super().__init__(part, listener, server, warm_up)
        self._manager = manager

    def manager(self) -> Any:
        """As `Serving.manager`."""
        return self._manager

    def connect(self) -> SglangCalls:
        """As `Serving.connect`."""
        return SglangCalls(SchedulerRpc(self._part.port_args.rpc_ipc_name))
