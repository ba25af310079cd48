"""Memory of a GPU for transfers: each lane has a stream of its own, and a copy goes on while its thread reads the next bytes.

Whatever is copied has to be pinned for that: a copy from or to other memory is done in pieces by the driver, and its call waits.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from gms_core.devices import DeviceId
from gms_core.errors import DriverError, GmsError
from gms_core.snapshot.hash_cuda import DeviceHash
from gms_core.snapshot.kernels import MOST_RANGES, TILE_BYTES
from gms_core.snapshot.memories import Arrival, Waiter
from gms_core.snapshot.plan import Extents
from gms_core.snapshot.transfer import CopyLane, LaneHash, Place
from gms_core.vmm.cuda_calls import attribute, checked, cuda, find_device
from gms_core.vmm.driver import Address
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)

_PORTABLE = 0x01
_READ_ONLY = 0x08


class CudaMemory:
    """See `gms_core.snapshot.memories.memory_for`.

    It uses the device's primary context, and begins to make it at once: that takes a tenth of a second.

    Args:
        device: UUID, as NVML writes it.
        allocations: Offset in the arena, and bytes, of each, in the order of the image.

    Raises:
        DeviceNotFound: This process does not see it.
        DriverUnavailable: No driver, or no GPU that this process can see.
    """

    def __init__(self, device: DeviceId, allocations: Sequence[tuple[int, int]]) -> None:
        self._device = find_device(device)
        self._extents = Extents(allocations)
        self._smallest = min((size for _, size in allocations), default=0)
        self._whole_tiles = not any((place | size) % TILE_BYTES for place, size in allocations)
        self._arrival = Arrival()
        self._lock = threading.Lock()
        self._context: Any = None
        self._hash: DeviceHash | None = None
        self._preparing: threading.Thread | None = None
        self._cannot_hash = False
        self._closed = False
        self._beginning = threading.Thread(target=self._begin, name="gms-snapshot-context", daemon=True)
        self._beginning.start()

    def ready(self, base: Address) -> None:
        """See `ArenaMemory.ready`."""
        self._arrival.ready(base)

    def never(self) -> None:
        """See `ArenaMemory.never`."""
        self._arrival.never()

    def lane(self, *, spin: bool = False) -> CopyLane:
        """See `Memory.lane`."""
        return _CudaLane(self._retained, self._hashing, self._extents, self._arrival.waiter(), spin)

    def prepare_hash(self, block_bytes: int) -> None:
        """See `Memory.prepare_hash`."""
        if not self._whole_tiles or block_bytes % TILE_BYTES or block_bytes // self._smallest + 2 > MOST_RANGES:
            log.info(
                "checksums are found by the host: blocks of %d bytes in allocations from %d bytes on are none for a GPU", block_bytes, self._smallest
            )
            return
        preparing = threading.Thread(target=self._prepare_hash, name="gms-snapshot-hash", daemon=True)
        try:
            preparing.start()
        except RuntimeError as error:
            log.warning("checksums are found by the host, since no thread can be started: %s", error)
            return
        self._preparing = preparing

    def register(self, address: int, size: int, *, writable: bool = True) -> None:
        """See `Memory.register`."""
        if not writable and not attribute("READ_ONLY_HOST_REGISTER_SUPPORTED", self._device):
            raise DriverError("this GPU's driver cannot pin memory that is mapped for reading alone")
        flags = _PORTABLE if writable else _PORTABLE | _READ_ONLY
        with _current(self._retained()):
            checked("cuMemHostRegister", address, size, flags, about=f"{size} bytes at {address:#x}")

    def unregister(self, address: int) -> None:
        """See `Memory.unregister`."""
        with _current(self._retained()):
            checked("cuMemHostUnregister", address, about=f"{address:#x}")

    def places(self, offset: int, size: int) -> Sequence[Place]:
        """See `Memory.places`."""
        return self._arrival.places(self._extents, offset, size, self._device)

    def close(self) -> None:
        """See `ArenaMemory.close`."""
        self._beginning.join()
        if self._preparing is not None:
            self._preparing.join()
        with self._lock, UndoStack() as undo:
            closed, self._closed = self._closed, True
            if self._context is not None and not closed:
                undo.push(checked, "cuDevicePrimaryCtxRelease", self._device)
                if self._hash is not None:
                    with _current(self._context):
                        self._hash.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.never()
        self.close()

    def _begin(self) -> None:
        try:
            self._retained()
        except GmsError as error:  # whoever needs it first meets the same
            log.debug("no context on device %s yet: %s", self._device, error)

    def _prepare_hash(self) -> None:
        try:
            with _current(self._retained()):
                self._hash = DeviceHash()
        except GmsError as error:  # a device that is full now may not be once the memory is there: who asks tries again
            log.debug("the GPU cannot find checksums yet: %s", error)

    def _hashing(self) -> DeviceHash | None:
        """What finds checksums; None if the device cannot. Called with the context current."""
        if self._preparing is None:
            return None
        self._preparing.join()
        with self._lock:
            if self._hash is None and not self._cannot_hash:
                try:
                    self._hash = DeviceHash()
                except GmsError as error:
                    self._cannot_hash = True
                    log.warning("checksums are found by the host, since the GPU cannot: %s", error)
            return self._hash

    def _retained(self) -> Any:
        with self._lock:
            if self._closed:
                raise DriverError("this memory was closed")
            if self._context is None:
                self._context = checked("cuDevicePrimaryCtxRetain", self._device)
            return self._context


@contextlib.contextmanager
def _current(context: Any) -> Iterator[None]:
    with UndoStack() as undo:
        checked("cuCtxPushCurrent", context)
        undo.push(checked, "cuCtxPopCurrent")
        yield


class _CudaLane:
    """A stream, and an event for each copy or hash that is under way. Its thread has the context current from the first use to `close`."""

    def __init__(self, context: Callable[[], Any], hashing: Callable[[], DeviceHash | None], extents: Extents, waiter: Waiter, spin: bool) -> None:
        self._context = context
        self._hashing = hashing
        self._extents = extents
        self._waiter = waiter
        self._spin = spin
        self._stream: Any = None
        self._copied: Any = None
        self._idle: list[Any] = []
        self._pending: dict[int, Any] = {}
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
            checked("cuMemcpyHtoDAsync", base + place, source + inside, length, self._stream, about=f"{length} bytes to {base + place:#x}")
        return self._mark(self._stream)

    def from_memory(self, target: int, offset: int, size: int) -> int:
        """See `CopyLane.from_memory`."""
        self._open()
        base = self._waiter.base()
        for place, inside, length in self._extents.ranges(offset, size):
            checked("cuMemcpyDtoHAsync", target + inside, base + place, length, self._stream, about=f"{length} bytes from {base + place:#x}")
        return self._mark(self._stream)

    def wait(self, ticket: int) -> None:
        """See `CopyLane.wait`."""
        event = self._pending.get(ticket)
        if event is not None:
            checked("cuEventSynchronize", event)
            del self._pending[ticket]
            self._idle.append(event)

    def hash(self) -> LaneHash | None:
        """See `CopyLane.hash`."""
        self._open()
        hashing = self._hashing()
        return None if hashing is None else _CudaHash(self, hashing)

    def begin_hash(self, hashing: DeviceHash, offset: int, size: int) -> tuple[int, int]:
        """Have a part of the image hashed; returns a ticket for `wait`, and where its checksum will be."""
        self._open()
        base = self._waiter.base()
        if self._copied is None:
            self._copied = checked("cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        checked("cuEventRecord", self._copied, self._stream)
        with UndoStack() as undo:
            event = self._event()
            undo.push(self._idle.append, event)
            slot, stream = hashing.begin(self._copied, [(base + place, length) for place, _, length in self._extents.ranges(offset, size)])
            undo.push(checked, "cuStreamSynchronize", stream)  # without an event, `close` would not know of it
            ticket = self._mark(stream, event)
            undo.commit()
        return ticket, slot

    def close(self) -> None:
        """See `CopyLane.close`. If the device does not answer any more, what it was given is left to it."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        copied, self._copied = self._copied, None
        with UndoStack() as undo:
            undo.push(checked, "cuCtxPopCurrent")
            checked("cuStreamSynchronize", stream)
            for event in self._pending.values():  # of a hash that nobody waits for any more
                checked("cuEventSynchronize", event)
            undo.push(checked, "cuStreamDestroy", stream)
            for event in (*self._idle, *self._pending.values(), *((copied,) if copied is not None else ())):
                undo.push(checked, "cuEventDestroy", event)
            self._idle.clear()
            self._pending.clear()

    def _open(self) -> None:
        if self._stream is not None:
            return
        with UndoStack(kept=lambda: self._stream is not None) as undo:
            checked("cuCtxPushCurrent", self._context())
            undo.push(checked, "cuCtxPopCurrent")
            self._stream = checked("cuStreamCreate", int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def _event(self) -> Any:
        if self._idle:
            return self._idle.pop()
        # The interpreter's lock is not held either way.
        wait = cuda.CUevent_flags.CU_EVENT_DEFAULT if self._spin else cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        return checked("cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING | wait))

    def _mark(self, stream: Any, event: Any = None) -> int:
        event = self._event() if event is None else event
        ticket = next(self._tickets)
        checked("cuEventRecord", event, stream)
        self._pending[ticket] = event
        return ticket


class _CudaHash:
    """See `LaneHash`."""

    def __init__(self, lane: _CudaLane, hashing: DeviceHash) -> None:
        self._lane = lane
        self._hashing = hashing
        self._slots: dict[int, int] = {}

    def begin(self, offset: int, size: int) -> int:
        """See `LaneHash.begin`."""
        ticket, self._slots[ticket] = self._lane.begin_hash(self._hashing, offset, size)
        return ticket

    def end(self, ticket: int) -> int:
        """See `LaneHash.end`."""
        self._lane.wait(ticket)
        return self._hashing.end(self._slots.pop(ticket))
