"""The KV memory of a rank whose engine fails over: addresses from the start, and beneath them the retained pool's memory once the rank holds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gms_core.client import RetainedArena, RetainedPool
from gms_core.client.arena import round_up
from gms_core.client.session import SLAB_BYTES
from gms_core.errors import InvalidArgument
from gms_core.kv.front import Cut, Range, View, borders, covers, cut, front_of, merged, size_of
from gms_core.kv.private import Clear
from gms_core.protocol.messages import Held
from gms_core.vmm.driver import Address, Driver


class TakenOver(NamedTuple):
    """How a rank came to its memory.

    Attributes:
        epoch: Of the pool.
        bytes: Mapped; of the front alone if that is all that can be used.
        hold_s: Seconds until the pool was granted.
        map_s: Seconds from then until the memory could be used.
        whole: Whether all of it can be used; else the front alone, until `RetainedKv.map_rest`.
    """

    epoch: int
    bytes: int
    hold_s: float
    map_s: float
    whole: bool = True


class RetainedKv:
    """Addresses for the raw buffers of a KV cache, with scratch beneath them until the pool's memory is mapped.

    Every buffer begins at a multiple of the driver's granularity, as PyTorch has it for buffers of this size. Behind the last one lies one granule
    for a mark: it is there once some holder has filled the rest with zeros.

    Args:
        driver: Of the device.
        clear: Makes fresh memory of it zero.
        buffers: Bytes of each buffer that is going to be placed. Without any, the granule of the mark is all: to hold it is to be the one engine.
        alias_bytes: Bytes of the scratch.

    Attributes:
        buffers: Bytes of each buffer, as they were named.
        arena: The addresses.
        size: Bytes for the buffers.
        scratch_bytes: Memory that the scratch takes.
        front: What the rank can begin with before it may have the rest: all that the pool has twice; empty if it has to wait for all.
    """

    def __init__(self, driver: Driver, clear: Clear, buffers: Sequence[int], alias_bytes: int) -> None:
        self.buffers = tuple(buffers)
        self._driver, self._make_zero = driver, clear
        self._placed = 0
        self._alias_bytes = alias_bytes
        self._held: Held | None = None
        self._twice: list[Range] = []
        self.front: tuple[Range, ...] = ()
        self.size = sum(round_up(size, driver.granularity) for size in buffers)
        self.arena = RetainedArena(driver, self.size + driver.granularity)
        try:
            self.scratch_bytes = self.arena.map_scratch(alias_bytes)
            # Warm-up reads it before it writes it, and what a device has in fresh memory may be no number.
            self._clear([Range(0, self.arena.size)])
        except BaseException:
            self.arena.close()
            raise

    @property
    def free(self) -> int:
        """Bytes of the device that nobody has."""
        return self._driver.memory_info().free

    def place(self, size: int) -> int:
        """The address for the next buffer.

        Raises:
            InvalidArgument: There is no room left for it.
        """
        offset, end = self._placed, self._placed + round_up(size, self._driver.granularity)
        if end > self.size:
            raise InvalidArgument(f"a buffer of {size} bytes is one too many for {self.size} bytes of KV memory")
        self._placed = end
        return self.arena.base + offset

    def allocations(self, front: Sequence[Range] = ()) -> Cut:
        """How the memory is cut into allocations, some of which are the front that a pool is to have twice."""
        return cut(self.arena.size, round_up(SLAB_BYTES[self._driver.name], self._driver.granularity), front)

    def first_blocks(self, views: Sequence[View], num_blocks: int, blocks: int) -> list[Range]:
        """Where the first blocks lie; empty if that is not certain.

        Args:
            views: All tensors of the KV cache.
            num_blocks: That each of them has.
            blocks: How many of these.
        """
        granularity = self._driver.granularity
        if front_of(views, num_blocks, num_blocks, granularity) != [Range(0, self.size)]:
            return []  # there is memory of the cache that is in none of them, or a tensor that is elsewhere
        return front_of(views, num_blocks, blocks, granularity)

    def adopt(self, pool: RetainedPool, front: Sequence[Range] = ()) -> None:
        """Get the pool's memory, so that it only has to be mapped at the promotion.

        Args:
            pool: Whose memory.
            front: Where the blocks lie that this rank would begin with. If the pool has that twice, scratch is cut at its borders; else there is no
                front.

        Raises:
            InvalidArgument: Its memory is not of this size, or it has none.
            OutOfMemory: There is no room for the scratch.
        """
        if pool.planned is None:
            raise InvalidArgument(f"pool {pool.name!r} has no plan yet")
        self.arena.adopt(pool.receive, pool.planned.allocations, pool.planned.spares)
        spares = [Range(spare.offset, spare.offset + spare.size) for spare in pool.planned.spares]
        self._twice = merged(spares)
        if front and covers(self._twice, front):
            self.scratch_bytes = self.arena.map_scratch(self._alias_bytes, borders(spares))
            self._clear([Range(0, self.arena.size)])
            self.front = tuple(self._twice)

    def take_over(
        self, pool: RetainedPool, mark: bytes, timeout_s: float, on_wait: Callable[[str], None] | None = None, *, bridge: bool = False
    ) -> TakenOver:
        """Wait until the pool is granted, and map its memory in the place of the scratch. Nothing may use the addresses meanwhile.

        Memory that is new is made zero, as engines do with memory of their own. Otherwise it is left as the last holder left it: with finite numbers,
        as a stock engine finds them in blocks that it gives out again.

        Args:
            pool: Whose memory was adopted.
            mark: What is written behind the memory once it is zero: bytes that it cannot have by chance.
            timeout_s: Seconds to wait at most.
            on_wait: Called with the reason, each time that it changes, while it waits.
            bridge: Whether the front alone is enough to begin with, if there is one.

        Raises:
            AcquireTimeout: The holder before has not ended in time. The call can be repeated, as after any other error.
            FenceFailed: It cannot be ended.
        """
        self._driver.synchronize()  # whatever was computed on scratch memory has to be over before that goes
        start = time.perf_counter()
        bridge = bridge and bool(self.front)
        if not bridge:
            self.arena.unmap()  # the scratch: the time for it passes while processes of the last holder are still ending
        if self._held is None:
            self._held = pool.hold(timeout_s, on_wait, bridge=bridge)
        granted = time.perf_counter()
        if self._held.whole:
            self._map_all(mark, ())
        else:
            self.arena.map_front(self._held.turn)
            self._clear(self.front)  # nobody may ever have made it zero
        size = self.size if self._held.whole else size_of(self.front)
        return TakenOver(self._held.epoch, size, granted - start, time.perf_counter() - granted, self._held.whole)

    def suspend(self) -> None:
        """Unmap the memory, which stays held with its contents. Idempotent."""
        self.arena.unmap()

    def resume(self) -> None:
        """Map what `suspend` has unmapped: the pool's memory, its front, or a shadow's scratch. Idempotent."""
        self.arena.remap()
        if self.arena.backing == "scratch":
            self._clear([Range(0, self.arena.size)])
        elif self.arena.backing == "front":
            self._clear(self._besides(self.front))

    def map_rest(self, mark: bytes) -> None:
        """Map all of the memory after the front: the server has said that it may be. Nothing may be computing meanwhile. Idempotent.

        Args:
            mark: As in `take_over`.

        Raises:
            InvalidArgument: The pool is not held.
        """
        if self._held is None:
            raise InvalidArgument("this rank does not hold its pool")
        self._driver.synchronize()
        self._map_all(mark, self.front)

    def _map_all(self, mark: bytes, used: Sequence[Range]) -> None:
        """Map the pool, and make it zero if it never was, but for ranges that are used already."""
        assert self._held is not None
        self.arena.map_pool(self._held.turn)
        place = Address(self.arena.base + self.size)
        if self._driver.read(place, len(mark)) != mark:
            self._clear(self._besides(used))
            self._driver.write(place, mark)
        elif not used:
            # The mark tells of one front. The other one may have been granted to an engine that died before it made it zero.
            self._clear(self._twice)

    def _besides(self, used: Sequence[Range]) -> list[Range]:
        edges = [0, *(offset for one in used for offset in one), self.arena.size]
        return [Range(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]

    def _clear(self, ranges: Sequence[Range]) -> None:
        for start, end in ranges:
            self._make_zero(Address(self.arena.base + start), end - start)
