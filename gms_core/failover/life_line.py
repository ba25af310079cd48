"""A line between the process that began an engine and those that are not its children, such as ranks that MPI starts: they end when it has ended.

Until all of an engine's processes have joined its cohort, no server ends the one for the other. The line is a socket in the abstract namespace under
the cohort's name: nobody else knows it, and the kernel cuts it, in whatever way the process ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading

from gms_core.config import settings
from gms_core.errors import ConnectionLost

MOST_PROCESSES = 4096
"""That can be on the line; the kernel has a limit of its own (net.core.somaxconn)."""

_line: socket.socket | None = None
_on_line = ""
"""The cohort with which this process ends already."""


def hold_life_line() -> None:
    """Let processes of this engine be on the line for as long as this process lives. Its cohort is in the environment.

    Raises:
        OSError: It cannot be had.
    """
    global _line
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.bind(_address())
        line.listen(MOST_PROCESSES)  # nobody accepts: whoever waits in the backlog is told of the end as well
    except BaseException:
        line.close()
        raise
    _line = line


def end_with_life_line() -> None:
    """From now on, end this process with SIGKILL when the one that began its engine has ended, in whatever way. Idempotent.

    Raises:
        ConnectionLost: That has ended already, or is on another machine.
    """
    global _on_line
    cohort = settings().cohort
    if _on_line == cohort:
        return
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(_address())
    except OSError as error:
        connection.close()
        raise ConnectionLost(f"the process that began engine {settings().engine} is not there any more") from error
    _on_line = cohort
    threading.Thread(target=_wait_for_end, args=(connection,), name="gms-life-line", daemon=True).start()


def _address() -> str:
    return f"\0gms-life-{settings().cohort}"


def _wait_for_end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)  # nothing is ever said
    os.kill(os.getpid(), signal.SIGKILL)


def _after_fork() -> None:
    global _line
    if _line is not None:
        _line.close()  # a copy would hold the line for a process that has ended
        _line = None


os.register_at_fork(after_in_child=_after_fork)
