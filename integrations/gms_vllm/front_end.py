"""vLLM's API servers: ready long before they serve, held until their engine is the primary, and leaving in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import vllm.envs as envs

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import EngineUnsupported, GmsError, PromotionFailed
from gms_core.failover.http import App, HoldMiddleware
from gms_core.failover.locks import FailoverLock, open_lock
from gms_core.failover.process import EngineProcess
from gms_core.failover.status import EngineState, RoleChange
from gms_core.failover.threads import in_thread
from gms_vllm.cohort import GRACE_S, ApiPlace, settle, this_process
from gms_vllm.gate import Gate, ListenLast
from gms_vllm.main_process import name_servers
from gms_vllm.rehearsal import rehearse
from gms_vllm.standing import Leader, Sibling, Standing
from gms_vllm.status_page import listen_at

log = logging.getLogger("vllm.gms")

DRAIN_CHECK_S = 0.05
"""Seconds between two looks at whether requests are still running."""
BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""

_lock: FailoverLock | None = None


def open_early(failover: FailoverConfig) -> None:
    """Open the lock before the engine starts, so that one that cannot be had is known at once, and so with the address of the status page."""
    global _lock
    _lock = open_lock(failover.lock)
    if failover.status_address:
        listen_at(failover.status_address).close()


def _tell(change: RoleChange) -> None:
    if change.role != "primary":  # that one has a line of its own, once it can be reached
        log.info("%s is %s%s", change.engine, change.role, f": {change.detail}" if change.detail else "")


class ApiServer:
    """One API server of an engine that fails over."""

    def __init__(self, app: Any, client: Any, sock: socket.socket | None, gms: GmsConfig, failover: FailoverConfig) -> None:
        """Prepare, in the event loop; nothing is connected yet.

        Args:
            app: vLLM's ``FastAPI``.
            client: vLLM's ``AsyncLLM``.
            sock: Bound by `gms_vllm.gate.set_up`.
            gms: The engine's block.
            failover: How it fails over.

        Raises:
            EngineUnsupported: There is no socket that could be held.
        """
        if sock is None:
            raise EngineUnsupported("this front end binds its address by itself, and cannot be held until it is promoted", hint="Use `vllm serve`.")
        self._app, self._client, self._gms, self._failover = app, client, gms, failover
        self._place = ApiPlace.of(client.vllm_config.parallel_config)
        self._gate = Gate(sock, Path(app.state.args.uds) if app.state.args.uds else None, BACKLOG)
        self._grace_s = GRACE_S + client.vllm_config.shutdown_timeout
        self._loop = asyncio.get_running_loop()
        told = this_process("")
        self._state = EngineState(told.engine, told.cohort, failover.lock, address=self._gate.address)
        self._state.listen(_tell)
        self._standing: Standing
        self._inner: App
        self._stop_engine: Callable[..., None] = client.shutdown
        self._failure: GmsError | None = None
        self._departed = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, original: Callable[[], Awaitable[Any]]) -> Any:
        """Take part in the engine's cohort and in the election, and serve as vLLM does once the gate is open.

        Args:
            original: vLLM's own ``serve_http``; it returns when the server has to end.

        Returns:
            What it returns.

        Raises:
            GmsError: The engine could not take part, or was ended by this error.
        """
        self._hold()
        process = await self._join()
        if self._place.rank == 0:
            lock = _lock or open_lock(self._failover.lock)
            self._standing = Leader(process, self._state, self._failover, lock, self._client, self._gate, rejoin=self._rejoin)
        else:
            self._standing = Sibling(process, self._state, self._client)
        await in_thread(lambda: self._standing.start(on_demote=self._demoted, on_lost=self._lost), name="gms-start")
        self._client.shutdown = self._shutdown
        self._begin(self._come_to_serve())
        try:
            ending = await original()
        finally:
            self._gate.let_go()
        server = self._app.state.server
        if not hasattr(server, "servers"):
            server.servers = []  # uvicorn's shutdown looks at it, and has not set it where it never listened
        if self._failure is not None:
            ending.close()
            raise self._failure
        return ending

    def _hold(self) -> None:
        """Put the gate around the app. The app's own list of middleware may be closed already, so it goes around all that is in it."""
        self._inner = self._app.middleware_stack or self._app.build_middleware_stack()
        self._app.middleware_stack = ListenLast(HoldMiddleware(self._inner, self._state), self._gate)

    async def _join(self) -> EngineProcess:
        """Join the engine's other processes to the cohort. The ranks have done so, and say where."""
        places = await self._client.collective_rpc("gms_place")
        sockets = tuple(dict.fromkeys(Path(place["socket"]) for place in places))
        patience_s = self._gms.connect_timeout_s
        if self._place.rank == 0:
            await self._client.engine_core.call_utility_async("gms_join", [str(path) for path in sockets], patience_s)
            if self._place.servers > 1:
                await in_thread(lambda: name_servers(sockets), name="gms-name-servers")
        deadline_s = self._failover.deadline_s or 0.0
        return this_process(f"api-server {self._place.rank}", sockets, deadline_s=deadline_s, connect_timeout_s=patience_s)

    def _api_keys(self) -> list[str]:
        """As vLLM finds them."""
        return [key for key in (self._app.state.args.api_key or [envs.VLLM_API_KEY]) if key]

    def _rejoin(self) -> None:
        """A server is back that was lost: this process has joined it, the others have to."""

        async def rejoin() -> None:
            try:
                await self._join()
            except Exception:
                log.exception("the engine's processes have not all joined the server that is back: it will not end them if one of them dies")

        self._loop.call_soon_threadsafe(lambda: self._begin(rejoin()))

    async def _come_to_serve(self) -> None:
        await self._gate.reached()
        with self._ended_by_errors():
            if self._place.rank == 0 and self._failover.rehearse:  # before any of the engine's API servers can serve
                await rehearse(self._app, self._inner, self._client, self._api_keys())
            if self._failover.huge_pages:
                await self._settle()
            if self._failover.gate == "503":
                self._gate.open()
            await self._standing.become_primary()
            if self._failover.gate == "port":
                self._gate.open()
        if self._failure is not None or self._departed:
            return
        self._standing.gate_opened()
        with self._ended_by_errors():
            await self._standing.become_whole()

    @contextlib.contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """Whatever fails in the context ends the engine."""
        try:
            yield
        except GmsError as error:
            self._end(error)
        except Exception as error:
            if self._departed:  # an engine that ends answers nobody any more
                return
            log.exception("%s cannot serve at %s", self._state.engine, self._gate.address)
            self._end(PromotionFailed(f"{self._state.engine} cannot serve at {self._gate.address}: {error}"))

    async def _settle(self) -> None:
        """Let every process of the engine put its host memory into huge pages; this one, and from the first API server all others."""
        work: list[Awaitable[Any]] = [in_thread(lambda: settle(f"api-server {self._place.rank}"), name="gms-settle")]
        if self._place.rank == 0:
            work.append(self._client.engine_core.call_utility_async("gms_settle"))
            work.append(self._client.collective_rpc("gms_settle"))
        await asyncio.gather(*work)

    def _lost(self, error: GmsError) -> None:
        self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: GmsError) -> None:
        """End the engine by an error, in vLLM's orderly way, with this process's exit code telling it."""
        if self._departed or self._failure is not None:
            return
        self._failure = error
        self._state.end(error.message, error)
        log.error("%s ends: %s", self._state.engine, error)
        os.kill(os.getpid(), signal.SIGTERM)

    def _demoted(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._begin(self._demote()))

    async def _demote(self) -> None:
        """Stop taking requests, finish those that run, and end the engine."""
        if self._failover.gate == "port":
            self._stop_listening()
        self._state.end("demoted by an operator")
        try:
            async with asyncio.timeout(self._failover.drain_timeout_s):
                await self._drain()
        except TimeoutError:
            log.warning("%s ends although requests are running: they had %g s", self._state.engine, self._failover.drain_timeout_s)
        except Exception:  # such as an engine core that has died: the engine ends all the same
            log.exception("%s ends, and it is not known whether requests are running", self._state.engine)
        if self._place.rank == 0:
            os.kill(self._place.main_pid, signal.SIGTERM)

    def _stop_listening(self) -> None:
        server = self._app.state.server
        for task in list(getattr(server, "_accept_tasks", ())):
            task.cancel()
        self._gate.shut(getattr(server, "servers", ()))

    async def _drain(self) -> None:
        """Wait until no API server of the engine is answering any more."""
        while await self._client.engine_core.call_utility_async("gms_unfinished", *self._place, len(self._app.state.server.server_state.tasks)):
            await asyncio.sleep(DRAIN_CHECK_S)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        """VLLM's shutdown of the engine, of which the servers are told before. One that has crashed does not leave in order: it is fenced."""
        if not self._departed and not self._client.errored:
            self._departed = True
            self._state.end("stopped")
            self._standing.depart(self._grace_s)
        self._stop_engine(*args, **kwargs)
        self._standing.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the service."""
        started = self._loop.create_task(work)
        self._tasks.add(started)
        started.add_done_callback(self._tasks.discard)
