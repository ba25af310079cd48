"""Let PyTorch allocate GPU tensors in an arena: a memory pool over an allocator whose two callbacks are `ctypes` function pointers.

The pool holds what the thread that opened the context allocates, on one device. Other threads allocate as always, so a loader's worker threads
should fill tensors that are there, not make new ones; whatever they make all the same is copied when the module is published.

The callbacks run Python while PyTorch holds its allocator's lock. A second thread that frees GPU tensors in that instant waits for that lock, and may
hold the interpreter's lock, for which the callback waits; `vllm.device_allocator.cumem` has the same limit. While a context is open, one thread alone
should make and drop GPU tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gms_core.errors import DriverError, DriverUnavailable, SessionClosed
from gms_core.pytorch.free_ranges import FreeRanges
from gms_core.pytorch.memory import ALIGNMENT, TensorArena

log = logging.getLogger(__name__)

SEGMENT = 2 * 2**20
"""Bytes: PyTorch asks for multiples of it, and aligns to it what it hands out as a segment."""

# torch/csrc/cuda/CUDAPluggableAllocator.h: void*(size_t, int, cudaStream_t) and void(void*, size_t, int, cudaStream_t).
_MALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)

_everlasting: list[object] = []
"""PyTorch calls the callbacks, and looks into the pools, for as long as a tensor lives; so these live as long as the process."""


class ArenaPool:
    """Gives parts of an arena to PyTorch.

    A pool serves one `capture`: segments that PyTorch has no more use for can then be given out otherwise, since it never asks that pool again.

    Args:
        arena: Writable, and able to grow.
        device: With a number.

    Raises:
        DriverUnavailable: This PyTorch is built without CUDA, or has no such interface.
    """

    def __init__(self, arena: TensorArena, device: torch.device) -> None:
        customise = getattr(torch._C, "_cuda_customAllocator", None)  # noqa: SLF001 - CUDAPluggableAllocator wants a shared library
        if customise is None or not hasattr(torch.cuda, "MemPool") or not hasattr(torch.cuda, "use_mem_pool"):
            raise DriverUnavailable(f"PyTorch {torch.__version__} cannot allocate in an arena", hint="Install PyTorch 2.9 or later, built with CUDA.")
        self.failure: BaseException | None = None
        self._arena = weakref.ref(arena)
        self._device = device
        self._lock = threading.RLock()
        self._given: dict[int, int] = {}
        self._callbacks = (_MALLOC(self._malloc), _FREE(self._free))
        self._allocator: Any = customise(*(ctypes.cast(callback, ctypes.c_void_p).value for callback in self._callbacks))
        with torch.cuda.device(device):
            self.mem_pool: Any = torch.cuda.MemPool(self._allocator)
        _everlasting.append(self)

    def _malloc(self, size: int, device: int, stream: int | None) -> int | None:  # noqa: ARG002 - PyTorch's signature
        try:
            if device != self._device.index:
                raise DriverError(f"PyTorch asked the pool of {self._device} for memory of device {device}")
            arena = self._arena()
            if arena is None:
                raise SessionClosed("the arena that this pool allocates in is gone")
            with self._lock:
                (offset,) = give_out(arena, [size], SEGMENT)
                address = arena.base + offset
                self._given[address] = size
                self.failure = None
                return address
        except BaseException as error:  # noqa: BLE001 - nothing may pass through PyTorch's frames; `capture` raises it
            self.failure = error
            return None

    def _free(self, address: int | None, size: int, device: int, stream: int | None) -> None:  # noqa: ARG002 - PyTorch's signature
        try:
            arena = self._arena()
            with self._lock:
                given = address is not None and self._given.pop(address, None) is not None
                if address is not None and given and arena is not None and self._device_is_done():
                    _free_ranges(arena).add(address - arena.base, size)
        except BaseException as error:  # noqa: BLE001 - nothing may pass through PyTorch's frames; `capture` raises it
            self.failure = error

    def _device_is_done(self) -> bool:
        # cudaFree, which PyTorch counts on here, would wait. While a graph is captured nothing can wait, and the bytes stay unused.
        if torch.cuda.is_current_stream_capturing():
            return False
        torch.cuda.synchronize(self._device)
        return True

    def reclaim(self) -> None:
        """Take back the segments in which no tensor is left. No work that uses them may be under way, and no capture."""
        arena = self._arena()
        if arena is None:
            return
        segments = self.mem_pool.snapshot()
        with self._lock:
            for segment in segments:
                size = self._given.get(segment["address"])
                if size is not None and segment["allocated_size"] == 0 and segment["active_size"] == 0:
                    del self._given[segment["address"]]
                    _free_ranges(arena).add(segment["address"] - arena.base, size)


_pools: weakref.WeakKeyDictionary[TensorArena, list[ArenaPool]] = weakref.WeakKeyDictionary()
_ranges: weakref.WeakKeyDictionary[TensorArena, FreeRanges] = weakref.WeakKeyDictionary()


def _free_ranges(arena: TensorArena) -> FreeRanges:
    return _ranges.setdefault(arena, FreeRanges())


@contextlib.contextmanager
def capture(arena: TensorArena, device: torch.device) -> Iterator[None]:
    """While it lasts, GPU tensors that this thread makes lie in the arena. On the CPU it does nothing: publishing copies.

    What is freed meanwhile is used again by PyTorch itself, and the rest of it by `publish`. Once the arena is read-only, freeing has no effect.

    Args:
        arena: Of a write lease.
        device: The arena's device.

    Raises:
        GmsError: The arena could not grow: PyTorch's error, which would only say that memory is short, is its cause.
        DriverUnavailable: See `ArenaPool`.
    """
    if device.type != "cuda":
        yield
        return
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    pool = ArenaPool(arena, device)
    _pools.setdefault(arena, []).append(pool)
    try:
        with torch.cuda.use_mem_pool(pool.mem_pool, device):
            yield
    except BaseException as error:
        if pool.failure is not None and isinstance(error, Exception):
            raise pool.failure from error
        raise
    if pool.failure is not None:
        log.warning("an allocation in the arena failed, and the code that wanted it went on without: %s", pool.failure)


def reclaim(arena: TensorArena) -> None:
    """Take back all segments of an arena in which no tensor is left. No work that uses them may be under way, and no capture."""
    for pool in _pools.pop(arena, []):
        pool.reclaim()


def give_out(arena: TensorArena, sizes: Sequence[int], alignment: int = ALIGNMENT) -> list[int]:
    """Give out parts of an arena: first what was given back, then new bytes, of which no more are backed than it takes.

    Args:
        arena: Writable, and able to grow.
        sizes: Bytes of each part; a part without bytes takes no place.
        alignment: Of the offsets.

    Returns:
        The offset of each part.

    Raises:
        OutOfMemory: It cannot grow; what was given back may be used up.
    """
    free = _free_ranges(arena)
    offsets = [free.take(size, alignment) if size else 0 for size in sizes]
    new = sum(-(-size // alignment) * alignment for size, offset in zip(sizes, offsets, strict=True) if offset is None)
    if new and alignment < SEGMENT:
        arena.reserve_exact(new + -arena.used % alignment)
    return [arena.allocate(size, alignment) if offset is None else offset for size, offset in zip(sizes, offsets, strict=True)]
