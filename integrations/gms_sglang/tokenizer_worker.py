"""One of SGLang's tokenizer workers in an engine that fails over: a process with an app, an HTTP server and a tokenizer of its own."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from sglang.srt.entrypoints.http_server import get_global_state

from gms_core.failover.status import EngineState, RoleChange
from gms_patches.for_sglang import WAIT_AND_WARM_UP
from gms_sglang import sleep_answers
from gms_sglang.ending import Ending
from gms_sglang.engine_calls import SglangCalls
from gms_sglang.hooks import Hook, engage
from gms_sglang.http_server import Serving
from gms_sglang.load_file import unname_load_file
from gms_sglang.part import Part
from gms_sglang.scheduler_rpc import SchedulerRpc
from gms_sglang.tokenizer_calls import FirstCalls, FurtherCalls, Mates
from gms_sglang.warm_up import WarmUp

_FINISHED_AGAIN_S = 0.05
"""Seconds between two looks at whether requests are still running."""


def serve(config: uvicorn.Config, listener: socket.socket, part: Part, mates: Mates) -> None:
    """Serve until the engine ends. SGLang loads no plugins in this process, so what it needs of GMS is put in place here.

    Args:
        config: Of SGLang's app.
        listener: Bound to the engine's address, and shared by all of its workers.
        part: Which of them this is, and what it serves.
        mates: The others.

    Raises:
        GmsError: The engine could not take part, or was ended by this error.
        SystemExit: SGLang's app has not started.
    """
    warm_up = WarmUp()
    engage((*sleep_answers.HOOKS, Hook(WAIT_AND_WARM_UP, "around", warm_up.run)))
    server = _Server(config)
    server.serving = _WorkerServing(part, listener, server, warm_up, mates)
    try:
        server.run([listener])
    finally:
        warm_up.settle(False)
    server.serving.check()


class _Server(uvicorn.Server):
    """Uvicorn's, which serves under the rules of failover."""

    serving: _WorkerServing

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await self.serving.run(functools.partial(super().serve, sockets))


class _WorkerServing(Serving):
    """That of a tokenizer worker, in which SGLang makes a tokenizer manager when its app starts."""

    def __init__(self, part: Part, listener: socket.socket, server: uvicorn.Server, warm_up: WarmUp, mates: Mates) -> None:
        super().__init__(part, listener, server, warm_up)
        self._mates = mates

    def manager(self) -> Any:
        """As `Serving.manager`."""
        return get_global_state().tokenizer_manager

    def connect(self) -> SglangCalls:
        """As `Serving.connect`. One process can bind the address to which the ranks connect."""
        if self._part.place.rank:
            return FurtherCalls(self._mates)
        return FirstCalls(SchedulerRpc(self._part.port_args.rpc_ipc_name), self._mates, self._all_ready)

    def ending(self) -> Ending:
        """As `Serving.ending`."""
        return _WorkerEnding(self._server)

    def watch(self, state: EngineState) -> None:
        """As `Serving.watch`: the first worker waits for the others."""
        if self._part.place.rank:
            state.listen(self._changed)

    def _changed(self, change: RoleChange) -> None:
        if change.role == "standby":
            self._mates.tell_ready()

    def _all_ready(self) -> None:
        """Each worker has opened SGLang's file of load figures."""
        unname_load_file(self._part.port_args, self.manager())


class _WorkerEnding(Ending):
    """Of a worker, which ends alone: its main process ends the engine once all of them have. SGLang would end the schedulers with the first one."""

    async def stop(self, close: Callable[[], None]) -> None:  # noqa: ARG002 - this end comes back
        """As `Ending.stop`."""
        while self._manager.rid_to_state:
            await asyncio.sleep(_FINISHED_AGAIN_S)
        self._server.should_exit = True
