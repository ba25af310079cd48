"""Memory of the ``host`` device for transfers: a copy is done when its call comes back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from gms_core.snapshot.memories import Arrival, Waiter
from gms_core.snapshot.plan import Extents
from gms_core.snapshot.transfer import CopyLane, Place
from gms_core.vmm.driver import Address


class HostMemory:
    """See `gms_core.snapshot.memories.memory_for`.

    Args:
        allocations: Offset in the arena, and bytes, of each, in the order of the image.
    """

    def __init__(self, allocations: Sequence[tuple[int, int]]) -> None:
        self._extents = Extents(allocations)
        self._arrival = Arrival()

    def ready(self, base: Address) -> None:
        """See `ArenaMemory.ready`."""
        self._arrival.ready(base)

    def never(self) -> None:
        """See `ArenaMemory.never`."""
        self._arrival.never()

    def lane(self, *, spin: bool = False) -> CopyLane:  # noqa: ARG002 - copies end in the call that begins them
        """See `Memory.lane`."""
        return _HostLane(self._extents, self._arrival.waiter())

    def prepare_hash(self, block_bytes: int) -> None:
        """See `Memory.prepare_hash`. The host's memory is hashed by the host."""

    def register(self, address: int, size: int, *, writable: bool = True) -> None:
        """See `Memory.register`. To the CPU all memory is the same."""

    def unregister(self, address: int) -> None:
        """See `Memory.unregister`."""

    def places(self, offset: int, size: int) -> Sequence[Place]:
        """See `Memory.places`."""
        return self._arrival.places(self._extents, offset, size)

    def close(self) -> None:
        """See `ArenaMemory.close`. Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.never()
        self.close()


class _HostLane:
    def __init__(self, extents: Extents, waiter: Waiter) -> None:
        self._extents = extents
        self._waiter = waiter

    def arrive(self) -> None:
        """See `CopyLane.arrive`."""
        self._waiter.base()

    def abandon(self) -> None:
        """See `CopyLane.abandon`."""
        self._waiter.abandon()

    def to_memory(self, offset: int, source: int, size: int) -> int:
        """See `CopyLane.to_memory`."""
        base = self._waiter.base()
        for place, inside, length in self._extents.ranges(offset, size):
            ctypes.memmove(base + place, source + inside, length)  # without the interpreter's lock
        return 0

    def from_memory(self, target: int, offset: int, size: int) -> int:
        """See `CopyLane.from_memory`."""
        base = self._waiter.base()
        for place, inside, length in self._extents.ranges(offset, size):
            ctypes.memmove(target + inside, base + place, length)
        return 0

    def wait(self, ticket: int) -> None:
        """See `CopyLane.wait`."""

    def hash(self) -> None:
        """See `CopyLane.hash`. The host's memory is hashed by the host."""

    def close(self) -> None:
        """See `CopyLane.close`."""
