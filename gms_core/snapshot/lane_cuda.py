"""One thread's way to a GPU's memory: a stream, and an event for each copy or batch of hashes that is under way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from gms_core.snapshot.hash_cuda import DeviceHash
from gms_core.snapshot.kernels import MOST_BLOCKS
from gms_core.snapshot.memories import Waiter
from gms_core.snapshot.plan import Extents
from gms_core.snapshot.transfer import LaneHash
from gms_core.vmm.cuda_calls import checked, cuda
from gms_core.vmm.quick_calls import QuickCalls
from gms_core.vmm.undo import UndoStack


class Device(Protocol):
    """What the lanes of a memory share."""

    @property
    def quick(self) -> QuickCalls:
        """Calls that keep the interpreter's lock."""

    def is_pinned(self, address: int) -> bool:
        """Whether host memory has been pinned."""

    @property
    def can_hash(self) -> bool:
        """Whether `hashing` may be asked for: not where the host has to find the checksums."""

    @property
    def hash_is_ready(self) -> bool:
        """Whether `hashing` would not wait."""

    def context(self) -> Any:
        """The device's primary context; it is made by whoever asks first."""

    def hashing(self) -> DeviceHash | None:
        """What finds checksums, once it has been made ready; None if it could not be."""


class _Event(NamedTuple):
    """An event, and its number for the quick calls."""

    event: Any
    number: int


class CudaLane:
    """See `CopyLane`. Its thread has the context current from the first use to `close`.

    Args:
        device: Which the memory is on.
        extents: Of the image.
        waiter: For the arena.
        spin: See `Memory.lane`.
    """

    def __init__(self, device: Device, extents: Extents, waiter: Waiter, spin: bool) -> None:
        self._device = device
        self._extents = extents
        self._waiter = waiter
        self._spin = spin
        self._quick = device.quick
        self._stream: Any = None
        self._stream_number = 0
        self._copied: Any = None
        self._idle: list[_Event] = []
        self._pending: dict[int, _Event] = {}
        self._tickets = itertools.count(1)

    def arrive(self) -> None:
        """See `CopyLane.arrive`."""
        self._open()
        self._waiter.base()

    def abandon(self) -> None:
        """See `CopyLane.abandon`."""
        self._waiter.abandon()

    def to_memory(self, offset: int, source: int, size: int) -> int:
        """See `CopyLane.to_memory`."""
        self._open()
        base = self._waiter.base()
        for place, inside, length in self._extents.ranges(offset, size):
            if self._device.is_pinned(source + inside):
                self._quick.copy_to_device(base + place, source + inside, length, self._stream_number)
            else:
                checked("cuMemcpyHtoDAsync", base + place, source + inside, length, self._stream, about=f"{length} bytes to {base + place:#x}")
        return self._mark()

    def from_memory(self, target: int, offset: int, size: int) -> int:
        """See `CopyLane.from_memory`."""
        self._open()
        base = self._waiter.base()
        for place, inside, length in self._extents.ranges(offset, size):
            checked("cuMemcpyDtoHAsync", target + inside, base + place, length, self._stream, about=f"{length} bytes from {base + place:#x}")
        return self._mark()

    def wait(self, ticket: int) -> None:
        """See `CopyLane.wait`."""
        event = self._pending.get(ticket)
        if event is not None:
            if not self._quick.is_done(event.number):
                checked("cuEventSynchronize", event.event)
            del self._pending[ticket]
            self._idle.append(event)

    def hash(self) -> LaneHash | None:
        """See `CopyLane.hash`."""
        return _CudaHash(self, self._device) if self._device.can_hash else None

    def begin_hash(self, hashing: DeviceHash, blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Have parts of the image hashed.

        Args:
            hashing: Does it.
            blocks: Offset, and bytes, of each.

        Returns:
            A ticket for `wait`, and the number of the batch.
        """
        self._open()
        base = self._waiter.base()
        if self._copied is None:
            self._copied = checked("cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        checked("cuEventRecord", self._copied, self._stream)
        lie = [[(base + place, length) for place, _, length in self._extents.ranges(offset, size)] for offset, size in blocks]
        with UndoStack() as undo:
            event = self._event()
            undo.push(self._idle.append, event)
            batch, stream = hashing.begin(self._copied, lie)
            undo.push(checked, "cuStreamSynchronize", stream)  # without an event, `close` would not know of it
            checked("cuEventRecord", event.event, stream)
            undo.commit()
        return self._keep(event), batch

    def close(self) -> None:
        """See `CopyLane.close`. If the device does not answer any more, what it was given is left to it."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        copied, self._copied = self._copied, None
        with UndoStack() as undo:
            undo.push(checked, "cuCtxPopCurrent")
            checked("cuStreamSynchronize", stream)
            for pending in self._pending.values():  # of hashes that nobody waits for any more
                checked("cuEventSynchronize", pending.event)
            undo.push(checked, "cuStreamDestroy", stream)
            for event in (*(kept.event for kept in (*self._idle, *self._pending.values())), *((copied,) if copied is not None else ())):
                undo.push(checked, "cuEventDestroy", event)
            self._idle.clear()
            self._pending.clear()

    def _open(self) -> None:
        if self._stream is not None:
            return
        with UndoStack(kept=lambda: self._stream is not None) as undo:
            checked("cuCtxPushCurrent", self._device.context())
            undo.push(checked, "cuCtxPopCurrent")
            stream = checked("cuStreamCreate", int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
            self._stream_number = int(stream)
            self._stream = stream

    def _event(self) -> _Event:
        if self._idle:
            return self._idle.pop()
        # The interpreter's lock is not held either way.
        wait = cuda.CUevent_flags.CU_EVENT_DEFAULT if self._spin else cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        event = checked("cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING | wait))
        return _Event(event, int(event))

    def _mark(self) -> int:
        """A ticket for what is in the stream."""
        event = self._event()
        self._quick.record(event.number, self._stream_number)
        return self._keep(event)

    def _keep(self, event: _Event) -> int:
        ticket = next(self._tickets)
        self._pending[ticket] = event
        return ticket


class _CudaHash:
    """See `LaneHash`."""

    at_once = MOST_BLOCKS

    def __init__(self, lane: CudaLane, device: Device) -> None:
        self._lane = lane
        self._device = device
        self._batches: dict[int, tuple[DeviceHash, int, int]] = {}

    @property
    def is_ready(self) -> bool:
        """See `LaneHash.is_ready`."""
        return self._device.hash_is_ready

    def begin(self, blocks: Sequence[tuple[int, int]]) -> int | None:
        """See `LaneHash.begin`."""
        hashing = self._device.hashing()
        if hashing is None:
            return None
        ticket, batch = self._lane.begin_hash(hashing, blocks)
        self._batches[ticket] = hashing, batch, len(blocks)
        return ticket

    def end(self, ticket: int) -> list[int]:
        """See `LaneHash.end`."""
        self._lane.wait(ticket)
        hashing, batch, count = self._batches.pop(ticket)
        return hashing.end(batch, count)
