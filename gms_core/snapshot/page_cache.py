"""Whether a file is in memory already: in a tmpfs, or in the page cache. Reading it from a disk once more would take longer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from gms_core.snapshot.buffers import MappedFile
from gms_core.snapshot.system_calls import number, system_call

_SAMPLES = 64
_SAMPLE_BYTES = 2**20


class _Range(ctypes.Structure):
    _fields_ = (("position", ctypes.c_uint64), ("size", ctypes.c_uint64))


class _Found(ctypes.Structure):
    """``struct cachestat`` of ``linux/mman.h``."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "written_back", "evicted", "recently_evicted"))


def share_in_memory(descriptor: int, size: int) -> float:
    """Which part of a file is in memory, from 0 to 1, by some samples of a large one; 0 where the kernel does not tell.

    Args:
        descriptor: Open for reading.
        size: Bytes, which the file has.
    """
    pages = cached = 0
    try:
        for position, length in _samples(size):
            pages += -(-length // os.sysconf("SC_PAGESIZE"))
            cached += _cached(descriptor, position, length)
    except OSError:  # Linux before 6.5, or a file of somebody else
        return _share_of_mapped(descriptor, size)
    return cached / pages if pages else 0.0


def _samples(size: int) -> list[tuple[int, int]]:
    """Position and bytes of what is looked at: all of a small file, and parts of a large one at equal distances."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [(0, size)] if size else []
    step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1) // _SAMPLE_BYTES * _SAMPLE_BYTES
    return [(place * step, _SAMPLE_BYTES) for place in range(_SAMPLES)]


def _cached(descriptor: int, position: int, size: int) -> int:
    """Pages of a part that are in memory."""
    call = number("cachestat")
    if call is None:
        raise OSError
    wanted, found = _Range(position, size), _Found()
    system_call(call, descriptor, ctypes.addressof(wanted), ctypes.addressof(found), 0)
    return int(found.cached)


def _share_of_mapped(descriptor: int, size: int) -> float:
    """As `share_in_memory`, with the call of older kernels, which tells the truth to those alone who may write to the file or own it."""
    if not size:
        return 0.0
    try:
        if os.fstat(descriptor).st_uid != os.geteuid() and not os.access(Path("/proc/self/fd") / str(descriptor), os.W_OK, effective_ids=True):
            return 0.0
        mapped = MappedFile(descriptor, size)
    except OSError:
        return 0.0
    try:
        samples = _samples(size)
        return sum(mapped.is_resident(*sample) for sample in samples) / len(samples)
    finally:
        mapped.close()
