"""Which blocks a save that is resumed need not write again: nothing is believed of them, they are read and compared with the memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from gms_core.snapshot.folders import explained
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.transfer import File, Memory

_THREADS = 4


def still_right(files: Sequence[File], work: Sequence[Piece], memory: Memory, block_bytes: int, workers: int = 0) -> dict[int, int]:
    """The checksums, by number, of the blocks whose files hold what the memory holds.

    Args:
        files: By the index that pieces have; they have their whole size.
        work: All blocks of the image.
        memory: Of the image; it is there.
        block_bytes: Of the largest block.
        workers: Threads; 0 for some.

    Raises:
        TransferFailed: A file cannot be read.
    """
    count = min(workers or _THREADS, len(work)) or 1
    with ThreadPoolExecutor(count, thread_name_prefix="gms-compare") as pool:
        shares = pool.map(lambda first: _compare(files, work[first::count], memory, block_bytes), range(count))
        return {block: checksum for share in shares for block, checksum in share.items()}


def _compare(files: Sequence[File], work: Sequence[Piece], memory: Memory, block_bytes: int) -> dict[int, int]:
    """One thread's share."""
    same: dict[int, int] = {}
    lane = memory.lane()
    try:
        with mmap.mmap(-1, block_bytes) as buffer, memoryview(buffer) as view:
            address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            for piece in work:
                with view[: piece.size] as block:
                    written = _read(files[piece.shard], piece.position, block)
                    if written is None:
                        continue
                    lane.wait(lane.from_memory(address, piece.offset, piece.size))
                    if xxhash.xxh3_64_intdigest(block) == written:
                        same[piece.block] = written
    finally:
        lane.close()
    return same


def _read(file: File, position: int, block: memoryview) -> int | None:
    """The checksum of what the disk holds at a position; None if the file ends before. The bytes are in the block then.

    Pages are dropped first: those that the kernel could not write when nobody looked count as written, and are not what the disk holds.
    """
    with explained("read", Path(file.path)):
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.posix_fadvise(descriptor, position, len(block), os.POSIX_FADV_DONTNEED)
            done = 0
            while done < len(block):
                with block[done:] as rest:
                    count = os.preadv(descriptor, [rest], position + done)
                if count == 0:
                    return None
                done += count
        finally:
            os.close(descriptor)
    return xxhash.xxh3_64_intdigest(block)
