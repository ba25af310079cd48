"""Blocking waits beside an event loop, in daemon threads: a wait that never ends must not keep the interpreter from exiting.

The threads of `concurrent.futures`, and so of `asyncio.to_thread`, are joined when the interpreter exits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

SIGNALS_S = 0.2
"""Seconds after which a thread that waits looks whether a signal has come.

Python runs signal handlers in the main thread, between two steps of it. A signal that comes in the instant before that thread begins to wait for a
lock does not end the wait: the handler would run when the wait is over, which here may be hours later.
"""


async def in_thread(function: Callable[[], Result], *, name: str) -> Result:
    """Run a function that blocks in a daemon thread of its own, and wait for its result.

    If the waiting task is cancelled, the thread goes on, and its result is dropped.

    Args:
        function: What to run.
        name: Of the thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: Result | None = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future


def from_thread(loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, Result]]) -> Callable[[], Result]:
    """A blocking function, for other threads, that runs a coroutine function on an event loop and waits for its result.

    It never returns while the loop hangs, so it is the right form of an end-to-end check. In the main thread it lets signal handlers run.
    """

    def call() -> Result:
        running = asyncio.run_coroutine_threadsafe(function(), loop)
        while not concurrent.futures.wait([running], timeout=SIGNALS_S).done:
            pass
        return running.result()

    return call
