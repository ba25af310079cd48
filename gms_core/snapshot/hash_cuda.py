"""Checksums of a GPU's memory, found by the GPU: host processors have the copies to feed, and hashing would take as much of them as reading does.

What is compared is what lies in the memory that is published, and not what was copied there.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import xxhash

from gms_core.errors import DriverError, InvalidArgument
from gms_core.snapshot.kernels import MOST_BLOCKS, MOST_RANGES, THREADS, TILE_BYTES
from gms_core.vmm.cuda_calls import checked, cuda
from gms_core.vmm.undo import UndoStack

_BATCHES = 2048
"""That may be under way at once: two for each of the 1024 threads that a transfer may have."""

_STREAMS = 4
"""Batches that are hashed at once. Each takes a millisecond, in which less than half as much is copied."""


class _Block(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint64), ("end", ctypes.c_uint64 * MOST_RANGES), ("base", ctypes.c_uint64 * MOST_RANGES))


_Blocks = _Block * MOST_BLOCKS


class DeviceHash:
    """xxh3_64, by the GPU whose context is current when it is made. Its methods may be called from any thread with that context.

    It is tried at once: a driver may load code only when that is run.

    Raises:
        DriverError: The driver cannot compile or run the kernel, or has no memory for it; or its checksum is wrong.
    """

    def __init__(self) -> None:
        ptx = ctypes.create_string_buffer(files("gms_core.snapshot.kernels").joinpath("xxh3.ptx").read_bytes())
        with UndoStack() as undo:
            self._module: Any = checked("cuModuleLoadData", ctypes.addressof(ptx))
            undo.push(checked, "cuModuleUnload", self._module)
            self._kernel: Any = checked("cuModuleGetFunction", self._module, b"gms_xxh3_64")
            self._page = int(checked("cuMemHostAlloc", 8 * MOST_BLOCKS * _BATCHES, 0))
            undo.push(checked, "cuMemFreeHost", self._page)
            self._found = (ctypes.c_uint64 * (MOST_BLOCKS * _BATCHES)).from_address(self._page)
            self._idle = deque(range(_BATCHES))
            self._streams: list[Any] = []
            for _ in range(_STREAMS):
                self._streams.append(checked("cuStreamCreate", int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
                undo.push(checked, "cuStreamDestroy", self._streams[-1])
            self._try()
            undo.commit()

    def begin(self, after: Any, blocks: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, Any]:
        """Hash some blocks; returns the number of the batch, for `end`, and the stream that will have hashed it.

        Args:
            after: The event before which the blocks are not there.
            blocks: `MOST_BLOCKS` at most. Of each, address and bytes of its contiguous parts, in its order; the bytes are multiples of `TILE_BYTES`.

        Raises:
            InvalidArgument: There are too many blocks or parts, or one is no such multiple.
            DriverError: The driver refuses.
        """
        told = _batch(blocks)
        batch = self._idle.popleft()
        stream = self._streams[batch % _STREAMS]
        arguments = (told, ctypes.c_uint64(self._page + 8 * MOST_BLOCKS * batch))
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with UndoStack() as undo:
            undo.push(self._idle.append, batch)
            checked("cuStreamWaitEvent", stream, after, 0)
            grid, threads, about = (len(blocks), 1, 1), (THREADS, 1, 1), f"the hash of {len(blocks)} blocks"
            checked("cuLaunchKernel", self._kernel, *grid, *threads, 0, stream, ctypes.addressof(pointers), 0, about=about)
            undo.commit()
        return batch, stream

    def end(self, batch: int, count: int) -> list[int]:
        """The checksums of the blocks of a batch, once its stream has come past it.

        Args:
            batch: Its number.
            count: Of its blocks.
        """
        found = self._found[MOST_BLOCKS * batch : MOST_BLOCKS * batch + count]
        self._idle.append(batch)
        return found

    def _try(self) -> None:
        with UndoStack() as undo:
            there = checked("cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
            undo.push(checked, "cuEventDestroy", there)
            tile = int(checked("cuMemAlloc", TILE_BYTES))
            undo.push(checked, "cuMemFree", tile)
            checked("cuMemsetD8Async", tile, 1, TILE_BYTES, self._streams[-1])
            checked("cuEventRecord", there, self._streams[-1])
            batch, stream = self.begin(there, [[(tile, TILE_BYTES)]] * MOST_BLOCKS)
            checked("cuStreamSynchronize", stream)
            found, right = self.end(batch, MOST_BLOCKS), xxhash.xxh3_64_intdigest(b"\1" * TILE_BYTES)
        for one in found:
            if one != right:
                raise DriverError(f"the GPU finds the checksum {one:016x} in place of {right:016x}")

    def close(self) -> None:
        """Give up what it has, once nothing is under way. Needs the context."""
        with UndoStack() as undo:
            undo.push(checked, "cuModuleUnload", self._module)
            undo.push(checked, "cuMemFreeHost", self._page)
            for stream in self._streams:
                undo.push(checked, "cuStreamDestroy", stream)


def _batch(blocks: Sequence[Sequence[tuple[int, int]]]) -> ctypes.Array[_Block]:
    """Blocks as the kernel is told of them."""
    if not 0 < len(blocks) <= MOST_BLOCKS:
        raise InvalidArgument(f"{len(blocks)} blocks cannot be hashed at once by a GPU")
    told = _Blocks()
    for block, ranges in zip(told, blocks, strict=False):
        if not 0 < len(ranges) <= MOST_RANGES or any(size <= 0 or size % TILE_BYTES for _, size in ranges):
            raise InvalidArgument(f"a block in {len(ranges)} parts, of {', '.join(str(size) for _, size in ranges)} bytes, cannot be hashed by a GPU")
        end = 0
        for number, (address, size) in enumerate(ranges):
            block.base[number] = address - end
            end += size
            block.end[number] = end
        block.size = end
    return told
