"""One API server of an engine that fails over: ready long before it serves, held until its engine is the primary, and leaving in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from gms_core.engine_log import log
from gms_core.errors import GmsError, PromotionFailed
from gms_core.failover.cohort import ApiPlace, settle, this_process
from gms_core.failover.front_end.engine import EngineCalls, HttpServer
from gms_core.failover.front_end.main_process import name_servers
from gms_core.failover.front_end.standing import Leader, Sibling, Standing
from gms_core.failover.locks import FailoverLock, open_lock
from gms_core.failover.nodes.part import begun_part
from gms_core.failover.process import EngineProcess
from gms_core.failover.status import EngineState, RoleChange
from gms_core.failover.steps import Steps
from gms_core.failover.threads import in_thread

if TYPE_CHECKING:
    from gms_core.engine_config import FailoverConfig

DRAIN_CHECK_S = 0.05
"""Seconds between two looks at whether requests are still running."""

_lock: FailoverLock | None = None


def open_early(failover: FailoverConfig) -> None:
    """Open the lock before the engine starts, so that one that cannot be had is known at once, and so with the address of the status page.

    Raises:
        GmsError: One of them cannot be had.
    """
    global _lock
    _lock = open_lock(failover.lock)
    if failover.status_address:
        from gms_core.failover.front_end.status_page import listen_at

        listen_at(failover.status_address).close()


def _tell(change: RoleChange) -> None:
    if change.role != "primary":  # that one has a line of its own, once it can be reached
        log().info("%s is %s%s", change.engine, change.role, f": {change.detail}" if change.detail else "")


class ApiServer:
    """One API server's way, from an engine that is up to its end: `start`, `come_to_serve`, `depart`, `close`.

    It lives in an event loop: it is made there, its coroutines run there, and the loop goes on for as long as the process serves. Where the thread
    that starts the engine has none, and blocks until it may serve, the loop is in a daemon thread:

        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="gms-front-end", daemon=True).start()
        server = from_thread(loop, make)()         # gms_core.failover.threads; make: a coroutine function that returns the ApiServer
        try:
            from_thread(loop, server.start)()
            if not from_thread(loop, server.come_to_serve)():  # blocks until clients may come, or the engine is ended
                raise server.state.over()
            ...                                    # it serves, until it is told to end
        finally:
            server.depart()                        # not if the engine has crashed
            ...                                    # the engine lets go of its memory
            server.close()

    `HttpServer` is then asked in that loop, and not in the one that serves.

    Attributes:
        state: The engine's, as this process knows it.
        failure: The error that ended it; None if there was none.
    """

    def __init__(
        self,
        engine: EngineCalls,
        http: HttpServer,
        place: ApiPlace,
        failover: FailoverConfig,
        *,
        connect_timeout_s: float,
        grace_s: float,
    ) -> None:
        """Prepare, in the event loop; nothing is connected yet. The cohort is in the environment.

        Args:
            engine: Its other processes.
            http: Of this process.
            place: Which of the engine's API servers this is.
            failover: How the engine fails over.
            connect_timeout_s: Seconds to connect to a device server.
            grace_s: Seconds that the engine has to end in order.
        """
        self._engine, self._http, self._place, self._failover = engine, http, place, failover
        self._connect_timeout_s, self._grace_s = connect_timeout_s, grace_s
        self._loop = asyncio.get_running_loop()
        told = this_process("")
        self.state = EngineState(told.engine, told.cohort, failover.lock, address=http.address)
        self.state.listen(_tell)
        self.failure: GmsError | None = None
        self._steps = Steps(self.state)
        self._standing: Standing | None = None
        self._departed = False
        self._tasks: set[asyncio.Task[object]] = set()

    async def start(self) -> None:
        """Take part in the engine's cohort. All ranks are up.

        Raises:
            GmsError: A server is not there, or does not want one of the engine's processes.
        """
        if (part := begun_part()) is not None:
            await in_thread(part.until_gathered, name="gms-gather")  # a death on a node that is not there yet could be missed
            self.state.listen(lambda change: part.stands(change.role, change.detail))
        process = await self._join()
        standing: Standing
        if self._place.rank == 0:
            lock = _lock or open_lock(self._failover.lock)
            standing = Leader(process, self.state, self._failover, lock, self._engine, self._http, rejoin=self._rejoin)
        else:
            standing = Sibling(process, self.state, self._engine, self._http)
        self._standing = standing
        await in_thread(lambda: standing.start(on_demote=self._demoted, on_lost=self._lost), name="gms-start")

    def begin(self) -> None:
        """Come to serve, beside whatever the event loop does. Called in it."""
        self._begin(self.come_to_serve())

    async def come_to_serve(self) -> bool:
        """Be elected, or follow the first API server, and open the gate. It has been started.

        Returns:
            Whether clients may come. If not, the engine ends: it departs, or is demoted, or its HTTP server has been told to end by an error.
        """
        assert self._standing is not None
        with self._ended_by_errors():
            await self._steps.take(self._http.prepared())
            if self._place.rank == 0 and self._failover.rehearse:  # before any of the engine's API servers can serve
                await self._steps.take(self._http.rehearse(self._engine))
            if self._failover.huge_pages:
                await self._steps.take(self._settle())
            if self._failover.gate == "503":
                await self._http.open()
            await self._standing.become_primary()
            if self._failover.gate == "port":
                await self._open_last()
        if self.state.role != "primary":
            return False
        self._standing.gate_opened()
        self._begin(self._become_whole(self._standing))
        return True

    async def _open_last(self) -> None:
        """Listen, unless the engine has ended since it became the primary, as one does that is demoted; whoever comes next has the address then."""
        if self.state.role == "primary":
            await self._http.open()
            if self.state.role != "primary":
                self._http.shut()

    def depart(self) -> None:
        """The engine ends in order: tell the servers so, before it does. One that has crashed does not: it is fenced. Idempotent; for any thread."""
        if not self._departed:
            self._departed = True
            self.state.end("stopped")
            if (part := begun_part()) is not None:
                part.depart(self._grace_s)
            if self._standing is not None:
                self._standing.depart(self._grace_s)

    def close(self) -> None:
        """The engine has let go of its memory: finish what else there is to do. Blocks for some seconds at most."""
        if self._standing is not None:
            self._standing.close()

    async def _join(self) -> EngineProcess:
        """Join the engine's other processes to the cohort. The ranks say where."""
        sockets = tuple(dict.fromkeys(await self._engine.place_ranks()))
        if self._place.rank == 0:
            await self._engine.join(sockets, self._connect_timeout_s)
            if self._place.servers > 1:
                await in_thread(lambda: name_servers(sockets, self._connect_timeout_s), name="gms-name-servers")
        deadline_s = self._failover.deadline_s or 0.0
        return this_process(f"api-server {self._place.rank}", sockets, deadline_s=deadline_s, connect_timeout_s=self._connect_timeout_s)

    def _rejoin(self) -> None:
        """A server is back that was lost: this process has joined it, the others have to."""

        async def rejoin() -> None:
            try:
                await self._join()
            except Exception:  # noqa: BLE001 - it is logged
                log().exception("the engine's processes have not all joined the server that is back: it will not end them if one of them dies")

        self._loop.call_soon_threadsafe(lambda: self._begin(rejoin()))

    async def _become_whole(self, standing: Standing) -> None:
        with self._ended_by_errors():
            await standing.become_whole()

    @contextlib.contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """Whatever fails in the context ends the engine."""
        try:
            yield
        except GmsError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - it is logged, and ends the engine
            if self._departed:  # an engine that ends answers nobody any more
                return
            log().exception("%s cannot serve at %s", self.state.engine, self._http.address)
            self._end(PromotionFailed(f"{self.state.engine} cannot serve at {self._http.address}: {error}"))

    async def _settle(self) -> None:
        """Let every process of the engine put its host memory into huge pages; this one, and from the first API server all others."""
        work: list[Awaitable[Any]] = [in_thread(lambda: settle(f"api-server {self._place.rank}"), name="gms-settle")]
        if self._place.rank == 0:
            work.append(self._engine.settle())
        await asyncio.gather(*work)

    def _lost(self, error: GmsError) -> None:
        self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: GmsError) -> None:
        """End the engine by an error, in its own orderly way, with this process's exit code telling it."""
        if self._departed or self.failure is not None:
            return
        self.failure = error
        self.state.end(error.message, error)
        log().error("%s ends: %s", self.state.engine, error)
        self._http.end()

    def _demoted(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._begin(self._demote()))

    async def _demote(self) -> None:
        """Stop taking requests, finish those that run, and end the engine."""
        if self._failover.gate == "port":
            self._http.shut()
        self.state.end("demoted by an operator")
        try:
            async with asyncio.timeout(self._failover.drain_timeout_s):
                await self._drain()
        except TimeoutError:
            log().warning("%s ends although requests are running: they had %g s", self.state.engine, self._failover.drain_timeout_s)
        except Exception:  # noqa: BLE001 - such as a scheduler that has died: it is logged, and the engine ends all the same
            log().exception("%s ends, and it is not known whether requests are running", self.state.engine)
        if self._place.rank == 0:
            os.kill(self._place.main_pid, signal.SIGTERM)

    async def _drain(self) -> None:
        """Wait until no API server of the engine is answering any more."""
        while await self._engine.unfinished(self._place, self._http.answering()):
            await asyncio.sleep(DRAIN_CHECK_S)

    def _begin(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine beside the service."""
        started = self._loop.create_task(work)
        self._tasks.add(started)
        started.add_done_callback(self._tasks.discard)
