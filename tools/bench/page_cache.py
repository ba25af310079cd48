"""What of files is in the page cache, and how to have all of it there, or nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gms_core.snapshot.buffers import MappedFile

PIECE_BYTES = 64 * 2**10
"""Looked at at once: it counts as cached if all of it is."""
READ_BYTES = 4 * 2**20


def forget(files: Sequence[tuple[Path, int]]) -> None:
    """Have the kernel drop files, with their bytes, from the page cache. They are on the disk already."""
    for path, _ in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill(files: Sequence[tuple[Path, int]]) -> None:
    """Have files, with their bytes, in the page cache."""
    if cached_share(files) == 1.0:
        return
    buffer = bytearray(READ_BYTES)
    for path, _ in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_share(files: Sequence[tuple[Path, int]]) -> float:
    """Share of files, with their bytes, that is in memory, from 0 to 1; 1 for those of a tmpfs."""
    cached = sum(_cached_bytes(path, size) for path, size in files)
    return cached / max(1, sum(size for _, size in files))


def _cached_bytes(path: Path, size: int) -> int:
    if not size:
        return 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mapped = MappedFile(descriptor, size)
    finally:
        os.close(descriptor)
    try:
        parts = ((position, min(PIECE_BYTES, size - position)) for position in range(0, size, PIECE_BYTES))
        return sum(length for position, length in parts if mapped.is_resident(position, length))
    finally:
        mapped.close()
