"""Arenas on real memory, without a server: what one arena writes, another maps read-only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gms_core.client.arena import Arena, Received, Take
from gms_core.protocol.framing import close_descriptors
from gms_core.vmm.driver import Access, Driver, Handle

MIB = 2**20


@dataclass
class Memory:
    """Physical memory of a driver, and the arenas that map it."""

    driver: Driver
    slab: int
    capacity: int = 64 * MIB
    handles: dict[int, tuple[Handle, int]] = field(default_factory=dict)
    arenas: list[Arena] = field(default_factory=list)
    refuse: bool = False

    def writable(self) -> Arena:
        """The arena of a writer; it grows."""
        arena = Arena(self.driver, self.capacity)
        arena.grow_from(self._provide, self.slab)
        self.arenas.append(arena)
        return arena

    def read_only(self, written: Arena) -> Arena:
        """The arena of a reader, with the memory of a writer."""
        arena = Arena(self.driver, max(written.length, 1), Access.READ)
        offsets = {one.id: one.offset for one in written.allocations}
        arena.adopt(lambda take: self._hand_over(list(offsets), take), lambda item: offsets[item.id])
        self.arenas.append(arena)
        return arena

    def _provide(self, sizes: Sequence[int], take: Take) -> None:
        from gms_core.errors import OutOfMemory

        if self.refuse:
            raise OutOfMemory("the device is full, says the test")
        first = len(self.handles)
        for number, size in enumerate(sizes, start=first):
            self.handles[number] = (self.driver.create(size), size)
        self._hand_over(range(first, len(self.handles)), take)

    def _hand_over(self, numbers: Iterable[int], take: Take) -> None:
        received = [Received(number, self.handles[number][1], self.driver.export(self.handles[number][0])) for number in numbers]
        try:
            take(received)
        finally:
            close_descriptors(item.descriptor for item in received)

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
        self.driver.close()
