"""SGLang's HTTP server under the rules of `gms_core.failover.front_end`.

SGLang prepares its FastAPI and gives it to uvicorn, which starts it, and listens once it is started. Here the app is started, and its word of that is
kept back until the engine is the primary; uvicorn gets a socket that is bound already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import uvicorn
from sglang.srt.entrypoints.http_server import app

from gms_core.engine_log import log
from gms_core.errors import EngineUnsupported
from gms_core.failover.cohort import GRACE_S, ApiPlace
from gms_core.failover.front_end.api_server import ApiServer
from gms_core.failover.front_end.engine import EngineCalls
from gms_core.failover.front_end.gate import Gate, ListenLast
from gms_core.failover.front_end.rehearsal import Request, rehearse
from gms_core.failover.http import App, HoldMiddleware, wrap_app
from gms_core.failover.status import EngineState
from gms_core.failover.threads import in_thread
from gms_sglang.arguments import Option
from gms_sglang.ending import Ending
from gms_sglang.engine_calls import SglangCalls
from gms_sglang.failover import Begun
from gms_sglang.scheduler_rpc import SchedulerRpc

BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""
APP_S = 5.0
"""Seconds that SGLang's app has to end, where it has not served."""
_TOKENS = {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}
_Serve = Callable[..., Awaitable[None]]


class SglangHttp:
    """`HttpServer` over SGLang's ``FastAPI`` and its uvicorn, whose listening socket is a gate's."""

    def __init__(self, server: uvicorn.Server, manager: Any, gate: Gate, keys: Sequence[str], own: Sequence[Request], ending: Ending) -> None:
        """Prepare; `hold` is next.

        Args:
            server: About to serve SGLang's app.
            manager: SGLang's ``TokenizerManager``.
            gate: Of the server's socket.
            keys: That the app wants one of.
            own: Requests of SGLang's own API, for the rehearsal.
            ending: Ends the process.
        """
        self._server = server
        self._manager = manager
        self._gate = gate
        self._keys, self._own = keys, own
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
        self._manager.auto_create_handle_loop()  # signals are for the engine from now on, and not for the HTTP server alone

    async def rehearse(self, engine: EngineCalls) -> None:
        """As `HttpServer.rehearse`."""
        await rehearse(app, self._inner, engine, self._keys, self._own)

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
        begun.append(Serving(engine, listener, server, manager, port_args))
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


class Serving:
    """One server's way, from an engine that is up to its end."""

    def __init__(self, engine: Begun, listener: socket.socket, server: uvicorn.Server, manager: Any, port_args: Any) -> None:
        self._engine, self._listener, self._server, self._manager, self._port_args = engine, listener, server, manager, port_args
        self._api_server: ApiServer
        self._ended = False

    async def run(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Take part in the engine's cohort and in the election, and serve as SGLang does once the gate is open.

        Args:
            serve: Uvicorn's own; it returns when the server has to end.

        Raises:
            GmsError: The engine could not take part, or was ended by this error.
        """
        engine, option = self._engine, self._engine.option
        gate = Gate(self._listener, None, BACKLOG)
        ending = Ending(self._server, self._manager)
        http = SglangHttp(self._server, self._manager, gate, _keys(option), _requests(option), ending)
        ranks = SchedulerRpc(self._port_args.rpc_ipc_name)
        calls = SglangCalls(ranks)
        grace_s = GRACE_S + engine.failover.drain_timeout_s
        api_server = ApiServer(calls, http, ApiPlace(), engine.failover, connect_timeout_s=engine.gms.connect_timeout_s, grace_s=grace_s)
        self._api_server = api_server
        http.hold(api_server.state)
        ending.take_signals(api_server.depart, http.shut, api_server.close)
        coming: asyncio.Future[None] | None = None
        try:
            await api_server.start()
            coming = asyncio.ensure_future(self._come_to_serve(api_server))
            cut_short = await ending.unless_ended(serve())
            if cut_short:
                engine.warm_up.settle(False)
                gate.let_go()
                await self._end_app()
        finally:
            self._ended = ending.begun
            engine.warm_up.settle(False)
            gate.let_go()
            if coming is not None:
                coming.cancel()
            ranks.close()
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
        self._engine.warm_up.settle(await api_server.come_to_serve())
        if api_server.failure is None:
            log().debug("%s has come to its gate", api_server.state.engine)


def _keys(option: Option) -> list[str]:
    return [key for key in (option("api_key"), option("admin_api_key")) if key]


def _requests(option: Option) -> list[Request]:
    asked = {"input_ids": [1, 2, 3]} if option("skip_tokenizer_init") else {"text": "hello"}
    return [("/generate", {**asked, "sampling_params": _TOKENS, "stream": stream}) for stream in (False, True)]
