"""Who saves a version, and whether that one has ended: told by the kernel of the same machine, and by nothing else.

There are no locks in an object store, and a clock does not tell a slow saver from a dead one. So a save is known to have ended if it says so itself,
or if its process is gone from the machine and the namespace that it named; of all others nothing is known.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec


class Saver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, so that it is not mistaken for another one.

    Attributes:
        host: The machine, for people.
        pid: Its number.
        boot: The run of the machine's kernel; empty if that is not known.
        namespace: Of processes, in which the number means something.
        started: When the process was, in the kernel's ticks.
    """

    host: str
    pid: int
    boot: str
    namespace: str
    started: str


def this_process() -> Saver:
    """The calling one."""
    return Saver(socket.gethostname(), os.getpid(), _boot(), _namespace(), _started(os.getpid()))


def has_ended(saver: Saver) -> bool:
    """Whether it is certain that a process is no more."""
    return _can_be_told(saver) and (_is_gone(saver.pid) or _started(saver.pid) not in ("", saver.started))


def is_alive(saver: Saver) -> bool:
    """Whether it is certain that a process is still there."""
    return _can_be_told(saver) and not _is_gone(saver.pid) and _started(saver.pid) == saver.started


def _can_be_told(saver: Saver) -> bool:
    """Whether it was started by the kernel, and in the namespace, that this process is of."""
    return bool(saver.boot and saver.namespace and saver.started) and (saver.boot, saver.namespace) == (_boot(), _namespace())


def _is_gone(pid: int) -> bool:
    """Whether no process has a number, or one that has ended and was not waited for yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # another user's, which may be hidden in /proc
    return _fields(pid)[:1] in (["Z"], ["X"])


def _boot() -> str:
    return _read(Path("/proc/sys/kernel/random/boot_id")).strip()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started; empty if that is not told."""
    fields = _fields(pid)
    return fields[19] if len(fields) > 19 else ""


def _fields(pid: int) -> list[str]:
    """What ``/proc/PID/stat`` has from the third field on: the second one is a name, and may have spaces."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
