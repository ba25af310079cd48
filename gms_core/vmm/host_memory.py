"""How much memory the machine lets this process have, and how much of it the allocations of this process hold."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from gms_core.vmm.driver import MemoryInfo

_CGROUPS = Path("/sys/fs/cgroup")
_FILES = {True: ("memory.max", "memory.current"), False: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
_STATISTICS = {True: "inactive_file ", False: "total_inactive_file "}

_DELETE_SELF = 0x400
_IGNORED = 0x8000
_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")


def machine_memory() -> MemoryInfo:
    """What the machine has, or this process's control groups allow of it.

    Linux: /proc/meminfo, and of both versions of control groups the limits on the way from this process's group to the root.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return MemoryInfo(free=free, total=total)


def _limits() -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        unified = number == "0"
        if not unified and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS if unified else _CGROUPS / "memory"
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if (found := _limit(root / group, unified)) is not None:
                yield found


def _limit(group: Path, unified: bool) -> tuple[int, int] | None:
    """Limit and use of one group, in bytes; None where it has no limit or is not there (a container sees its own group as the root)."""
    limit_file, used_file = _FILES[unified]
    try:
        limit, used = ((group / name).read_text().strip() for name in (limit_file, used_file))
        statistics = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    # Cached files that nobody has touched lately are dropped before anybody is refused.
    droppable = sum(int(line.rsplit(" ", 1)[1]) for line in statistics if line.startswith(_STATISTICS[unified]))
    return int(limit), max(0, int(used) - droppable)


class Ledger:
    """Bytes of the memory files that this process has made and that still exist, in whatever process.

    A descriptor or a mapping that another process has keeps a memory file alive, as it keeps memory of a GPU. inotify(7) tells when the last
    one is gone. Where the kernel grants no watch, a file counts until this process has closed it.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = -1
        self._sizes: dict[int, int] = {}
        self._unwatched = 0
        self._lock = threading.Lock()

    def add(self, descriptor: int, size: int) -> int:
        """Count a memory file. Returns what `closed` is told once this process has closed it."""
        with self._lock:
            if self._inotify < 0:
                self._inotify = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            path = f"/proc/self/fd/{descriptor}".encode()
            entry = self._libc.inotify_add_watch(self._inotify, path, _DELETE_SELF) if self._inotify >= 0 else -1
            if entry < 0:
                self._unwatched -= 1
                entry = self._unwatched
            self._sizes[entry] = size
            return int(entry)

    def closed(self, entry: int) -> None:
        """Take notice that this process has closed the file."""
        if entry < 0:
            with self._lock:
                self._sizes.pop(entry, None)

    @property
    def used(self) -> int:
        """Bytes of the files that still exist."""
        with self._lock:
            while self._inotify >= 0 and (events := self._read()):
                for entry, mask, _, _ in _EVENT.iter_unpack(events):
                    if mask & _IGNORED:
                        self._sizes.pop(entry, None)
                    elif mask & _OVERFLOW:
                        self._look_again()
            return sum(self._sizes.values())

    def _look_again(self) -> None:
        """Find out what still exists when more files have gone at once than the kernel tells of: it lists the watches that are left."""
        lines = Path(f"/proc/self/fdinfo/{self._inotify}").read_text().splitlines()
        left = {int(line.split()[1].removeprefix("wd:"), 16) for line in lines if line.startswith("inotify ")}
        self._sizes = {entry: size for entry, size in self._sizes.items() if entry < 0 or entry in left}

    def _read(self) -> bytes:
        try:
            return os.read(self._inotify, 256 * _EVENT.size)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Stop counting."""
        with self._lock:
            if self._inotify >= 0:
                os.close(self._inotify)
            self._inotify = -1
            self._sizes.clear()
