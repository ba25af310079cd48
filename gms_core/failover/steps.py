"""Steps of an engine on its way to its service. None of them outlasts the engine: whoever waits for one is told when the engine is ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from gms_core.failover.status import EngineState, RoleChange

Result = TypeVar("Result")


class Steps:
    """Takes steps for as long as an engine is not fenced. It is made in the event loop in which it takes them."""

    def __init__(self, state: EngineState) -> None:
        """Begin to look at the role.

        Args:
            state: The engine's; whichever thread ends it.
        """
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        state.listen(self._changed)

    async def take(self, step: Coroutine[Any, Any, Result]) -> Result:
        """The result of a step. It is cancelled once the engine is ended, and not waited for any more; of an engine that has ended it is not begun.

        Raises:
            GmsError: The engine was ended first: `EngineState.over`. Whatever the step raises is raised too.
        """
        if self._is_over():
            step.close()
            raise self._state.over()
        task = asyncio.ensure_future(step)
        try:
            await asyncio.wait((task, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if self._is_over():
                raise self._state.over()
            return task.result()
        finally:
            if not task.cancel() and not task.cancelled():
                task.exception()  # looked at, so that it is not logged as forgotten when the engine's end came first

    def _is_over(self) -> bool:
        return self._state.role == "fenced"

    def _changed(self, change: RoleChange) -> None:
        if change.role == "fenced":
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
