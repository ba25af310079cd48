"""Ends what was started under a mark once whoever started it is gone, however it ended: not even SIGKILL of a test run leaves an engine behind.

    python warden.py MARK

On standard input come the numbers of sessions that engines have of their own; its end is the sign. What belongs to the mark are those sessions, and
every process that has the mark in the environment it was started with. (Some engines write their titles over their environment, hence both.)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

VARIABLE = "GMS_TEST_MARK"
PATIENCE_S = 30.0


class Session(NamedTuple):
    """A session and when its first process was started, in ticks of the kernel: another session may get the number later."""

    number: int
    started: int


def session(pid: int) -> Session:
    """The session that a process, which must be its first one, leads."""
    return Session(pid, int(_fields(pid)[19]))


def marked(mark: str, sessions: Iterable[Session] = ()) -> list[int]:
    """Living processes that belong to a mark, this one excepted."""
    wanted = f"{VARIABLE}={mark}".encode()
    known = dict(sessions)
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError, IndexError):
                fields = _fields(int(name))
                own = known.get(int(fields[3]))
                belongs = own is not None and int(fields[19]) >= own
                if fields[0] not in "ZX" and (belongs or wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0")):
                    found.append(int(name))
    return found


def end_all(mark: str, sessions: Iterable[Session] = ()) -> list[int]:
    """Kill what belongs to a mark, until nothing is left of it; returns what could not be ended."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := marked(mark, sessions)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                pinned = os.pidfd_open(pid)
                try:
                    if pid in marked(mark, sessions):  # still the same process, now that its number is pinned
                        signal.pidfd_send_signal(pinned, signal.SIGKILL)
                finally:
                    os.close(pinned)
        time.sleep(0.05)
    return left


def _fields(pid: int) -> list[str]:
    """What /proc says of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


class Warden:
    """A mark for all that is started in its context, and a process that ends whatever belongs to it: when the context ends, or this process does."""

    def __init__(self) -> None:
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._sessions: list[Session] = []
        self._process = subprocess.Popen([sys.executable, "-I", __file__, self._mark], stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, pid: int) -> None:
        """The first process of a session has been started."""
        known = session(pid)
        self._sessions.append(known)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{known.number} {known.started}\n".encode())
        self._process.stdin.flush()

    def left(self) -> list[int]:
        """Living processes that belong to the mark."""
        return [pid for pid in marked(self._mark, self._sessions) if pid != self._process.pid]

    def __enter__(self) -> Self:
        os.environ[VARIABLE] = self._mark
        return self

    def __exit__(self, *_: object) -> None:
        del os.environ[VARIABLE]
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(2 * PATIENCE_S)


def main(mark: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions = []
    while select.select([sys.stdin], [], []) and (line := sys.stdin.readline()):
        sessions.append(Session(*map(int, line.split())))
    return len(end_all(mark, sessions))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
