"""Whether a file is in memory already: in a tmpfs, or in the page cache. Reading it from a disk once more would take longer."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from gms_core.snapshot.buffers import MappedFile

_TMPFS = 0x01021994
_SAMPLES = 64
_SAMPLE_BYTES = 2**20

_libc = ctypes.CDLL(None, use_errno=True)


def share_in_memory(descriptor: int, size: int) -> float:
    """Which part of a file is in memory, from 0 to 1, by some samples of a large one; 0 where the kernel does not tell.

    It tells those alone who own the file or may write to it; to others it would say that all of it is there. A tmpfs is known as such.

    Args:
        descriptor: Open for reading.
        size: Bytes, which the file has.
    """
    if not size:
        return 0.0
    try:
        if _lies_in_tmpfs(descriptor):
            return 1.0
        if os.fstat(descriptor).st_uid != os.geteuid() and not os.access(Path("/proc/self/fd") / str(descriptor), os.W_OK, effective_ids=True):
            return 0.0
        mapped = MappedFile(descriptor, size)
    except OSError:
        return 0.0
    try:
        pages = [(mapped.resident_pages(position, length), -(-length // mmap.PAGESIZE)) for position, length in _samples(size)]
    finally:
        mapped.close()
    return sum(resident for resident, _ in pages) / sum(all_pages for _, all_pages in pages)


def _lies_in_tmpfs(descriptor: int) -> bool:
    """Linux has a type for each kind of file system; the C library has it at the begin of what `fstatfs` fills."""
    found = (ctypes.c_long * 32)()
    return not _libc.fstatfs(descriptor, found) and found[0] == _TMPFS


def _samples(size: int) -> list[tuple[int, int]]:
    """Position and bytes of what is looked at: all of a small file, and parts of a large one at equal distances, its begin and its end among them."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [(0, size)]
    places = (place * (size - _SAMPLE_BYTES) // (_SAMPLES - 1) for place in range(_SAMPLES))
    return [(position - position % mmap.PAGESIZE, _SAMPLE_BYTES) for position in places]
