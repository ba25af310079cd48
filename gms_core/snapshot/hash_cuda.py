"""Checksums of a GPU's memory, found by the GPU: host processors have the copies to feed, and hashing would take as much of them as reading does.

What is compared is what lies in the memory that is published, and not what was copied there.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from gms_core.errors import InvalidArgument
from gms_core.vmm.cuda_calls import checked
from gms_core.vmm.undo import UndoStack

_THREADS = 288
"""Of the thread block that hashes a block: nine warps, see ``kernels/xxh3.cu``."""
_RANGES = 16
"""That a block may lie in."""
_SLOTS = 512
"""Blocks whose checksums may be under way at once."""
TILE_BYTES = 64 * 2**10
"""Whatever is hashed has a multiple of it. Allocations of a GPU have 2 MiB or a multiple."""


class _Ranges(ctypes.Structure):
    _fields_ = (("end", ctypes.c_uint64 * _RANGES), ("base", ctypes.c_uint64 * _RANGES))


class DeviceHash:
    """xxh3_64, by the GPU whose context is current when it is made. Its methods may be called from any thread with that context.

    Raises:
        DriverError: The driver cannot compile the kernel, or has no host memory to pin.
    """

    def __init__(self) -> None:
        ptx = ctypes.create_string_buffer(files("gms_core.snapshot.kernels").joinpath("xxh3.ptx").read_bytes())
        with UndoStack() as undo:
            self._module: Any = checked("cuModuleLoadData", ctypes.addressof(ptx))
            undo.push(checked, "cuModuleUnload", self._module)
            self._kernel: Any = checked("cuModuleGetFunction", self._module, b"gms_xxh3_64")
            self._page = int(checked("cuMemHostAlloc", 8 * _SLOTS, 0))
            undo.commit()
        self._found = (ctypes.c_uint64 * _SLOTS).from_address(self._page)
        self._idle = deque(range(_SLOTS))

    def begin(self, stream: Any, ranges: Sequence[tuple[int, int]]) -> int:
        """Hash a block once all that the stream was given before is done; returns where its checksum will be, for `end`.

        Args:
            stream: Of the driver.
            ranges: Address and bytes of each contiguous part, in the block's order; the bytes are multiples of `TILE_BYTES`.

        Raises:
            InvalidArgument: There are too many parts, or one is no such multiple.
            DriverError: The driver refuses.
        """
        if not 0 < len(ranges) <= _RANGES or any(size <= 0 or size % TILE_BYTES for _, size in ranges):
            raise InvalidArgument(f"a block in {len(ranges)} parts, of {', '.join(str(size) for _, size in ranges)} bytes, cannot be hashed by a GPU")
        told, size = _Ranges(), 0
        for number, (address, length) in enumerate(ranges):
            told.base[number] = address - size
            size += length
            told.end[number] = size
        slot = self._idle.popleft()
        arguments = (told, ctypes.c_uint64(size), ctypes.c_uint64(self._page + 8 * slot))
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        checked("cuLaunchKernel", self._kernel, 1, 1, 1, _THREADS, 1, 1, 0, stream, ctypes.addressof(pointers), 0, about=f"the hash of {size} bytes")
        return slot

    def end(self, slot: int) -> int:
        """The checksum that was begun there, once the stream has come past it."""
        found = int(self._found[slot])
        self._idle.append(slot)
        return found

    def close(self) -> None:
        """Give up what it has, once nothing is under way. Needs the context."""
        with UndoStack() as undo:
            undo.push(checked, "cuModuleUnload", self._module)
            checked("cuMemFreeHost", self._page)
