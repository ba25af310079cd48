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
from gms_core.snapshot.kernels import MOST_RANGES, THREADS, TILE_BYTES
from gms_core.vmm.cuda_calls import checked, cuda
from gms_core.vmm.undo import UndoStack

_SLOTS = 16384
"""Blocks whose checksums may be under way at once: sixteen for each of the 1024 threads that a transfer may have."""

_STREAMS = 16
"""Blocks that are hashed at once. One takes longer to be hashed than to be copied, as a single multiprocessor does it."""


class _Ranges(ctypes.Structure):
    _fields_ = (("end", ctypes.c_uint64 * MOST_RANGES), ("base", ctypes.c_uint64 * MOST_RANGES))


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
            self._page = int(checked("cuMemHostAlloc", 8 * _SLOTS, 0))
            undo.push(checked, "cuMemFreeHost", self._page)
            self._found = (ctypes.c_uint64 * _SLOTS).from_address(self._page)
            self._idle = deque(range(_SLOTS))
            self._streams: list[Any] = []
            for _ in range(_STREAMS):
                self._streams.append(checked("cuStreamCreate", int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
                undo.push(checked, "cuStreamDestroy", self._streams[-1])
            self._try()
            undo.commit()

    def begin(self, after: Any, ranges: Sequence[tuple[int, int]]) -> tuple[int, Any]:
        """Hash a block; returns where its checksum will be, for `end`, and the stream that will have it then.

        Args:
            after: The event before which the block is not there.
            ranges: Address and bytes of each contiguous part, in the block's order; the bytes are multiples of `TILE_BYTES`.

        Raises:
            InvalidArgument: There are too many parts, or one is no such multiple.
            DriverError: The driver refuses.
        """
        if not 0 < len(ranges) <= MOST_RANGES or any(size <= 0 or size % TILE_BYTES for _, size in ranges):
            raise InvalidArgument(f"a block in {len(ranges)} parts, of {', '.join(str(size) for _, size in ranges)} bytes, cannot be hashed by a GPU")
        told, size = _Ranges(), 0
        for number, (address, length) in enumerate(ranges):
            told.base[number] = address - size
            size += length
            told.end[number] = size
        slot = self._idle.popleft()
        stream = self._streams[slot % _STREAMS]
        arguments = (told, ctypes.c_uint64(size), ctypes.c_uint64(self._page + 8 * slot))
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with UndoStack() as undo:
            undo.push(self._idle.append, slot)
            checked("cuStreamWaitEvent", stream, after, 0)
            checked(
                "cuLaunchKernel", self._kernel, 1, 1, 1, THREADS, 1, 1, 0, stream, ctypes.addressof(pointers), 0, about=f"the hash of {size} bytes"
            )
            undo.commit()
        return slot, stream

    def end(self, slot: int) -> int:
        """The checksum that was begun there, once its stream has come past it."""
        found = int(self._found[slot])
        self._idle.append(slot)
        return found

    def _try(self) -> None:
        with UndoStack() as undo:
            there = checked("cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
            undo.push(checked, "cuEventDestroy", there)
            tile = int(checked("cuMemAlloc", TILE_BYTES))
            undo.push(checked, "cuMemFree", tile)
            checked("cuMemsetD8Async", tile, 1, TILE_BYTES, self._streams[-1])
            checked("cuEventRecord", there, self._streams[-1])
            slot, stream = self.begin(there, [(tile, TILE_BYTES)])
            checked("cuStreamSynchronize", stream)
            found, right = self.end(slot), xxhash.xxh3_64_intdigest(b"\1" * TILE_BYTES)
        if found != right:
            raise DriverError(f"the GPU finds the checksum {found:016x} in place of {right:016x}")

    def close(self) -> None:
        """Give up what it has, once nothing is under way. Needs the context."""
        with UndoStack() as undo:
            undo.push(checked, "cuModuleUnload", self._module)
            undo.push(checked, "cuMemFreeHost", self._page)
            for stream in self._streams:
                undo.push(checked, "cuStreamDestroy", stream)
