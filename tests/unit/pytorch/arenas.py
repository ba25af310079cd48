"""Arenas on real memory, without a server: what one arena writes, another maps read-only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gms_core.client.arena import Arena, Received
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
        received = [Received(one.id, one.size, self.driver.export(self.handles[one.id][0])) for one in written.allocations]
        arena.adopt(received, [one.offset for one in written.allocations])
        self.arenas.append(arena)
        return arena

    def _provide(self, sizes: Sequence[int]) -> list[Received]:
        from gms_core.errors import OutOfMemory

        if self.refuse:
            raise OutOfMemory("the device is full, says the test")
        received = []
        for size in sizes:
            handle = self.driver.create(size)
            number = len(self.handles)
            self.handles[number] = (handle, size)
            received.append(Received(number, size, self.driver.export(handle)))
        return received

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
        self.driver.close()
