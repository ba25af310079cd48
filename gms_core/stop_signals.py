"""The signals by which a user ends a command that runs until it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals(numbers: Iterable[signal.Signals]) -> Iterator[socket.socket]:
    """A socket on which a byte, the signal's number, arrives for each of these signals, which do nothing else meanwhile. For the main thread only.

    Args:
        numbers: The signals.
    """
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    old = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield reading
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        reading.close()
        writing.close()


@contextlib.contextmanager
def raising(number: signal.Signals, error: Callable[[], BaseException]) -> Iterator[Callable[[], None]]:
    """Have a signal raise an error wherever the main thread is, as SIGINT does. For the main thread only.

    Args:
        number: The signal.
        error: Makes it.

    Yields:
        To be called once it is too late for the error: from then on the signal does nothing, until the block is left.
    """
    too_late = False

    def over() -> None:
        nonlocal too_late
        too_late = True

    def handle(_: int, __: FrameType | None) -> None:
        if not too_late:
            raise error()

    old = signal.signal(number, handle)
    try:
        yield over
    finally:
        signal.signal(number, old)
