"""Memory of a GPU for transfers: each lane has a stream of its own, and a copy goes on while its thread reads the next bytes.

Whatever is copied has to be pinned for that: a copy from or to other memory is done in pieces by the driver, and its call waits.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from gms_core.devices import DeviceId
from gms_core.errors import DriverError, GmsError, TransferCancelled
from gms_core.snapshot.hash_cuda import DeviceHash
from gms_core.snapshot.kernels import MOST_RANGES, TILE_BYTES
from gms_core.snapshot.lane_cuda import CudaLane
from gms_core.snapshot.memories import Arrival
from gms_core.snapshot.plan import Extents
from gms_core.snapshot.transfer import CopyLane, Place
from gms_core.vmm.cuda_calls import attribute, checked, find_device
from gms_core.vmm.driver import Address
from gms_core.vmm.quick_calls import QuickCalls
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)

_PORTABLE = 0x01
_READ_ONLY = 0x08
_begin_of = operator.itemgetter(0)


class CudaMemory:
    """See `gms_core.snapshot.memories.memory_for`.

    It uses the device's primary context, and begins to make it at once: that takes a tenth of a second.

    Attributes:
        quick: Calls that keep the interpreter's lock.

    Args:
        device: UUID, as NVML writes it.
        allocations: Offset in the arena, and bytes, of each, in the order of the image.

    Raises:
        DeviceNotFound: This process does not see it.
        DriverUnavailable: No driver, or no GPU that this process can see.
    """

    def __init__(self, device: DeviceId, allocations: Sequence[tuple[int, int]]) -> None:
        self._device = find_device(device)
        self.quick = QuickCalls()
        self._extents = Extents(allocations)
        self._smallest = min((size for _, size in allocations), default=0)
        self._whole_tiles = not any((place | size) % TILE_BYTES for place, size in allocations)
        self._arrival = Arrival()
        self._lock = threading.Lock()
        self._context: Any = None
        self._hash: DeviceHash | None = None
        self._preparing: threading.Thread | None = None
        self._closed = False
        self._pinned: list[tuple[int, int]] = []
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
        return CudaLane(self, self._extents, self._arrival.waiter(), spin)

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

    @property
    def can_hash(self) -> bool:
        """Whether `hashing` may be asked for: not where the host has to find the checksums."""
        return self._preparing is not None

    @property
    def hash_is_ready(self) -> bool:
        """Whether `hashing` would not wait."""
        return self._preparing is not None and not self._preparing.is_alive()

    def hashing(self) -> DeviceHash | None:
        """What finds checksums, once it has been made ready; None if it could not be."""
        if self._preparing is not None:
            self._preparing.join()
        return self._hash

    def register(self, address: int, size: int, *, writable: bool = True) -> None:
        """See `Memory.register`."""
        if not writable and not attribute("READ_ONLY_HOST_REGISTER_SUPPORTED", self._device):
            raise DriverError("this GPU's driver cannot pin memory that is mapped for reading alone")
        flags = _PORTABLE if writable else _PORTABLE | _READ_ONLY
        with _current(self.context()):
            checked("cuMemHostRegister", address, size, flags, about=f"{size} bytes at {address:#x}")
        with self._lock:
            self._pinned = sorted([*self._pinned, (address, address + size)])

    def unregister(self, address: int) -> None:
        """See `Memory.unregister`."""
        with self._lock:
            self._pinned = [pinned for pinned in self._pinned if pinned[0] != address]
        with _current(self.context()):
            checked("cuMemHostUnregister", address, about=f"{address:#x}")

    def is_pinned(self, address: int) -> bool:
        """Whether host memory has been pinned."""
        pinned = self._pinned
        place = bisect_right(pinned, address, key=_begin_of) - 1
        return place >= 0 and address < pinned[place][1]

    def places(self, offset: int, size: int) -> Sequence[Place]:
        """See `Memory.places`."""
        return self._arrival.places(self._extents, offset, size, self._device)

    def close(self) -> None:
        """See `ArenaMemory.close`."""
        self._arrival.never()
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
            self.context()
        except GmsError as error:  # whoever needs it first meets the same
            log.debug("no context on device %s yet: %s", self._device, error)

    def _prepare_hash(self) -> None:
        waiter = self._arrival.waiter()
        try:
            with _current(self.context()):
                try:
                    self._hash = DeviceHash()
                except GmsError as error:  # a device that is full now may not be once the memory is there
                    log.debug("the GPU cannot find checksums yet: %s", error)
                    waiter.base()
                    self._hash = DeviceHash()
        except TransferCancelled:
            return
        except GmsError as error:
            log.warning("checksums are found by the host, since the GPU cannot: %s", error)

    def context(self) -> Any:
        """The device's primary context; it is made by whoever asks first."""
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
