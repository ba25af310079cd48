"""The signals by which a user ends a command that runs until it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[socket.socket]:
    """A socket on which a byte, the signal's number, arrives for each SIGINT, SIGTERM and SIGHUP; one that was ignored before stays ignored.

    For the main thread only.
    """
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    old = {number: signal.signal(number, lambda *_: None) for number in heard}
    try:
        yield reading
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        reading.close()
        writing.close()
