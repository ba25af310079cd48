"""vLLM's API servers under the rules of `gms_core.failover.front_end`."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import vllm.envs as envs

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import EngineUnsupported
from gms_core.failover.cohort import GRACE_S
from gms_core.failover.front_end.api_server import ApiServer
from gms_core.failover.front_end.engine import EngineCalls
from gms_core.failover.front_end.gate import Gate, ListenLast
from gms_core.failover.front_end.rehearsal import rehearse
from gms_core.failover.http import App, HoldMiddleware, wrap_app
from gms_core.failover.status import EngineState
from gms_vllm.engine_calls import VllmCalls
from gms_vllm.failover import api_place

BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""


class VllmHttp:
    """`HttpServer` over vLLM's ``FastAPI`` and its uvicorn, whose listening socket is a gate's."""

    def __init__(self, app: Any, gate: Gate) -> None:
        """Prepare; `hold` is next.

        Args:
            app: vLLM's ``FastAPI``.
            gate: Of its socket.
        """
        self._app = app
        self._gate = gate
        self._inner: App

    def hold(self, state: EngineState) -> None:
        """Put the gate around the app, before it is started."""
        self._inner = wrap_app(self._app, lambda inner: ListenLast(HoldMiddleware(inner, state), self._gate))

    @property
    def address(self) -> str:
        """As `HttpServer.address`."""
        return self._gate.address

    async def prepared(self) -> None:
        """As `HttpServer.prepared`."""
        await self._gate.reached()

    async def rehearse(self, engine: EngineCalls) -> None:
        """As `HttpServer.rehearse`; API keys as vLLM finds them."""
        keys = [key for key in (self._app.state.args.api_key or [envs.VLLM_API_KEY]) if key]
        await rehearse(self._app, self._inner, engine, keys)

    def check_alone(self) -> None:
        """As `HttpServer.check_alone`."""
        self._gate.check_alone()

    async def open(self) -> None:
        """As `HttpServer.open`."""
        self._gate.open()
        await self._gate.served_by(self._app.state.server)

    def shut(self) -> None:
        """As `HttpServer.shut`."""
        server = self._app.state.server
        for task in list(getattr(server, "_accept_tasks", ())):
            task.cancel()
        self._gate.shut(getattr(server, "servers", ()))

    async def beat(self) -> None:
        """As `HttpServer.beat`: it is asked in the loop that serves."""

    def answering(self) -> int:
        """As `HttpServer.answering`."""
        return len(self._app.state.server.server_state.tasks)

    def end(self) -> None:
        """As `HttpServer.end`."""
        os.kill(os.getpid(), signal.SIGTERM)


async def serve(
    app: Any, client: Any, sock: socket.socket | None, gms: GmsConfig, failover: FailoverConfig, original: Callable[[], Awaitable[Any]]
) -> Any:
    """Take part in the engine's cohort and in the election, and serve as vLLM does once the gate is open.

    Args:
        app: vLLM's ``FastAPI``.
        client: vLLM's ``AsyncLLM``.
        sock: Bound by `gms_vllm.gate.set_up`.
        gms: The engine's block.
        failover: How it fails over.
        original: vLLM's own ``serve_http``; it returns when the server has to end.

    Returns:
        What it returns.

    Raises:
        EngineUnsupported: There is no socket that could be held.
        GmsError: The engine could not take part, or was ended by this error.
    """
    if sock is None:
        raise EngineUnsupported("this front end binds its address by itself, and cannot be held until it is promoted", hint="Use `vllm serve`.")
    config = client.vllm_config
    gate = Gate(sock, Path(app.state.args.uds) if app.state.args.uds else None, BACKLOG)
    http, place, grace_s = VllmHttp(app, gate), api_place(config.parallel_config), GRACE_S + config.shutdown_timeout
    api_server = ApiServer(VllmCalls(client), http, place, failover, connect_timeout_s=gms.connect_timeout_s, grace_s=grace_s)
    http.hold(api_server.state)
    await api_server.start()
    client.shutdown = _departing(client, api_server)
    api_server.begin()
    try:
        ending = await original()
    finally:
        gate.let_go()
    if not hasattr(app.state.server, "servers"):
        app.state.server.servers = []  # uvicorn's shutdown looks at it, and has not set it where it never listened
    if api_server.failure is not None:
        ending.close()
        raise api_server.failure
    return ending


def _departing(client: Any, api_server: ApiServer) -> Callable[..., None]:
    """VLLM's shutdown of the engine, of which the servers are told before."""
    stop_engine: Callable[..., None] = client.shutdown

    def shutdown(*args: Any, **kwargs: Any) -> None:
        if not client.errored:  # an engine that has crashed does not leave in order
            api_server.depart()
        stop_engine(*args, **kwargs)
        api_server.close()

    return shutdown
