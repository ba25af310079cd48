"""Puts a process's own memory into huge pages, so that the kernel has less to do when the process dies.

A process is gone once the kernel has taken its memory apart, page by page: 50 to 90 ms for each GiB in pages of 4 KiB, and next to nothing in pages
of 2 MiB. Nobody may have a dead engine's KV memory before it is gone, so that is a part of every failover.

``MADV_COLLAPSE`` (madvise(2), since Linux 6.1) copies what is there into huge pages now, whatever the system's setting is for memory to come.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

HUGE_BYTES = 2 * 2**20
LIMIT_S = 15.0
"""Seconds that it may take; what is not done by then stays as it is."""
_MADV_COLLAPSE = 25
_ENTRY_BYTES = 8
_PRESENT = 0x80
"""Of the last byte of an entry of pagemap (proc_pid_pagemap(5)): the page is in memory."""
_ENTRIES_AT_ONCE = 2**16
"""Read at a time."""
_guard = threading.Lock()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Collapsed(NamedTuple):
    """What came of it.

    Attributes:
        bytes: In huge pages now, of those that were looked at.
        seconds: That it took.
    """

    bytes: int
    seconds: float


def collapse(limit_s: float = LIMIT_S) -> Collapsed:
    """Put this process's own memory into huge pages, where at least half of one is in use. Addresses and contents stay. Never raises.

    Args:
        limit_s: Seconds after which no further range is begun.
    """
    started = time.monotonic()
    done = refused = 0
    try:
        with _guard:  # two threads would only do everything twice
            for address in _ranges():
                if time.monotonic() - started > limit_s:
                    break
                if _libc.madvise(address, HUGE_BYTES, _MADV_COLLAPSE) == 0:
                    done += HUGE_BYTES
                    continue
                refused += 1
                if ctypes.get_errno() == errno.EINVAL and not done and refused > 64:  # a kernel that does not know it
                    break
    except OSError as error:
        log.debug("this process's memory cannot be looked at: %s", error)
    return Collapsed(done, time.monotonic() - started)


def _ranges() -> Iterator[int]:
    """Addresses of ranges of the size of a huge page that are this process's own, writable, and at least half in use."""
    entries = HUGE_BYTES // mmap.PAGESIZE
    file = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in _own():
            first = -(-start // HUGE_BYTES) * HUGE_BYTES
            while first + HUGE_BYTES <= end:
                count = min((end - first) // mmap.PAGESIZE, _ENTRIES_AT_ONCE) // entries * entries
                content = os.pread(file, count * _ENTRY_BYTES, first // mmap.PAGESIZE * _ENTRY_BYTES)
                if len(content) < count * _ENTRY_BYTES:
                    break
                flags = content[_ENTRY_BYTES - 1 :: _ENTRY_BYTES]
                for index in range(0, count, entries):
                    piece = flags[index : index + entries]
                    if piece.strip(b"\0") and 2 * sum(flag & _PRESENT for flag in piece) >= _PRESENT * entries:
                        yield first + index * mmap.PAGESIZE
                first += count * mmap.PAGESIZE
    finally:
        os.close(file)


def _own() -> list[tuple[int, int]]:
    """Start and end of this process's anonymous, writable memory, without its main stack (proc_pid_maps(5))."""
    found = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        name = fields[5] if len(fields) > 5 else ""
        if fields[1].startswith("rw") and fields[1][3] == "p" and fields[4] == "0" and (not name or name.startswith(("[heap]", "[anon"))):
            start, _, end = fields[0].partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found
