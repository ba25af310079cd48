"""The memory that a transfer fills or empties. It may appear only after a restore has begun to read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from gms_core.devices import HOST, DeviceId
from gms_core.errors import BackendUnavailable, InvalidArgument, TransferCancelled
from gms_core.snapshot.plan import Extents
from gms_core.snapshot.transfer import HOST_MEMORY, CopyLane, Memory, Place
from gms_core.vmm.driver import Address


class ArenaMemory(Memory, Protocol):
    """Memory of an image, in an arena of this process."""

    def ready(self, base: Address) -> None:
        """Say that the arena is mapped, writable for a restore, and where. Before the transfer is opened, or while it reads."""

    def never(self) -> None:
        """Say that the arena will not be mapped: who waits for it gives up. Nothing once it is `ready`. Idempotent."""

    def close(self) -> None:
        """Give up what copies need, once the transfer has finished. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Arrival:
    """Where an arena is, for those who wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._base: int | None = None
        self._never = False

    def ready(self, base: int) -> None:
        """It is here."""
        with self._changed:
            self._base = base
            self._changed.notify_all()

    def never(self) -> None:
        """It will not come."""
        with self._changed:
            self._never = True
            self._changed.notify_all()

    def waiter(self) -> Waiter:
        """One who waits."""
        return Waiter(self, self._changed)

    @property
    def base(self) -> int | None:
        """The first address, once it is known."""
        return self._base

    @property
    def lost(self) -> bool:
        """Whether it will not come."""
        return self._never and self._base is None

    def places(self, extents: Extents, offset: int, size: int, gpu: int = HOST_MEMORY) -> list[Place]:
        """See `Memory.places`, for an image whose parts lie so in the arena."""
        base = self._base
        if base is None:
            raise TransferCancelled("the transfer's memory is not there")
        return [Place(base + place, length, gpu) for place, _, length in extents.ranges(offset, size)]


class Waiter:
    """One lane's wait for the arena."""

    def __init__(self, arrival: Arrival, changed: threading.Condition) -> None:
        self._arrival = arrival
        self._changed = changed
        self._abandoned = False

    def base(self) -> int:
        """The arena's first address, once it is there.

        Raises:
            TransferCancelled: It will never be there, or `abandon` was called.
        """
        base = self._arrival.base
        if base is None:
            with self._changed:
                self._changed.wait_for(lambda: self._abandoned or self._arrival.lost or self._arrival.base is not None)
                base = self._arrival.base
        if base is None or self._abandoned:
            raise TransferCancelled("the transfer ended before its memory was there")
        return base

    def abandon(self) -> None:
        """Have `base` raise. Safe from any thread."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


class DiscardingMemory:
    """Memory that keeps nothing: what is read is checked, and forgotten."""

    def lane(self, *, spin: bool = False) -> CopyLane:  # noqa: ARG002 - there is nothing to wait for
        """See `Memory.lane`."""
        return _DiscardingLane()

    def prepare_hash(self, block_bytes: int) -> None:
        """See `Memory.prepare_hash`. Nothing lies here."""

    def register(self, address: int, size: int, *, writable: bool = True) -> None:
        """See `Memory.register`. There is nothing to do."""

    def unregister(self, address: int) -> None:
        """See `Memory.unregister`. There is nothing to do."""

    def places(self, offset: int, size: int) -> Sequence[Place]:
        """See `Memory.places`. There are none."""
        raise BackendUnavailable(
            f"{size} bytes at {offset} cannot be moved straight into a device's memory: there is none when a snapshot is verified",
            hint="Verify it with --backend staged: that reads the same files.",
        )

    def ready(self, base: Address) -> None:
        """See `ArenaMemory.ready`. It always is."""

    def never(self) -> None:
        """See `ArenaMemory.never`. It is there from the begin."""

    def close(self) -> None:
        """See `ArenaMemory.close`. There is nothing to do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _DiscardingLane:
    def arrive(self) -> None:
        """See `CopyLane.arrive`."""

    def abandon(self) -> None:
        """See `CopyLane.abandon`."""

    def to_memory(self, offset: int, source: int, size: int) -> int:  # noqa: ARG002 - the protocol's
        """See `CopyLane.to_memory`."""
        return 0

    def from_memory(self, target: int, offset: int, size: int) -> int:
        """There is nothing to copy."""
        raise InvalidArgument(f"{size} bytes at {offset} cannot be copied to {target:#x}: this memory keeps nothing")

    def wait(self, ticket: int) -> None:
        """See `CopyLane.wait`."""

    def hash(self) -> None:
        """See `CopyLane.hash`. Nothing lies here."""

    def close(self) -> None:
        """See `CopyLane.close`."""


def memory_for(device: DeviceId, allocations: Sequence[tuple[int, int]]) -> ArenaMemory:
    """The memory of an image on a device.

    Args:
        device: Which.
        allocations: Offset in the arena, and bytes, of each, in the order of the image.

    Raises:
        DeviceNotFound: This process does not see it.
        DriverUnavailable: Its driver, or the bindings, are missing.
    """
    # Each is imported when it is wanted: a machine without a GPU has no CUDA bindings.
    if device == HOST:
        from gms_core.snapshot.memory_host import HostMemory

        return HostMemory(allocations)
    from gms_core.snapshot.memory_cuda import CudaMemory

    return CudaMemory(device, allocations)
