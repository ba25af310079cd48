"""Waits beside an event loop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from gms_core.failover.threads import from_thread


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.timeout(30)
def test_signal_of_which_the_waiting_main_thread_was_not_woken_is_handled_all_the_same(loop: asyncio.AbstractEventLoop) -> None:
    handled = asyncio.Event()

    async def wait() -> str:
        # The kernel gives the signal to this thread, so that nothing ends the wait of the main thread.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        await handled.wait()
        return "handled"

    before = signal.signal(signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(handled.set))
    try:
        assert from_thread(loop, wait)() == "handled"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_error_of_the_coroutine_reaches_the_thread_that_waits(loop: asyncio.AbstractEventLoop) -> None:
    async def fails() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        from_thread(loop, fails)()
