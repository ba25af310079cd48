"""One contiguous range of virtual addresses into which a pool's allocations are mapped, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gms_core.client.segments import Exchange, Segment, grant, runs, unmap
from gms_core.errors import ArenaTooSmall, GmsError, InvalidArgument, OutOfMemory, ProtocolError, SessionClosed
from gms_core.layout import Allocation, check_allocations
from gms_core.vmm.driver import Access, Address, Descriptor, Driver
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Received:
    """An allocation as the server sent it. Its descriptor is closed once it has been taken."""

    id: int
    size: int
    descriptor: Descriptor


Take = Callable[[Sequence[Received]], None]
"""Makes use of allocations before their descriptors are closed. It is called for some at a time: a process need not have room for thousands of open
descriptors, and growing its table of them, which costs some ten milliseconds in a process with threads, is not needed either."""
Receive = Callable[[Take], None]
"""Gets allocations from the server."""
ReceiveSome = Callable[[Sequence[int], Take], None]
"""Gets allocations of these numbers from the server."""
Provide = Callable[[Sequence[int], Take], None]
"""Asks the server for new allocations of these sizes."""


MOST_AT_ONCE = 4096
"""Allocations of one request to the server, which refuses more than it has set itself a limit for."""


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``size``."""
    return -(-size // unit) * unit


class Arena:
    """Addresses of this process, bound to allocations that the server owns.

    A tensor's address is ``base + offset`` in every process; only ``base`` differs. Slabs are mapped whole and side by side, so a tensor may
    lie across several.

    Attributes:
        base: The first address.
        capacity: Bytes of reserved addresses.
        used: Bytes from ``base`` that `allocate` has given out.
    """

    def __init__(self, driver: Driver, capacity: int, access: Access = Access.READ_WRITE) -> None:
        self.capacity = round_up(max(capacity, 1), driver.granularity)
        self.base: Address = driver.reserve(self.capacity)
        self.used = 0
        self._driver = driver
        self._segments: list[Segment] = []
        self._strays: list[Segment] = []
        self._access = access
        self._mapped = True
        self._closed = False
        self._provide: Provide | None = None
        self._slab = 0

    def grow_from(self, provide: Provide, slab_bytes: int) -> None:
        """Let `allocate` extend the arena by slabs of so many bytes, a multiple of the granularity."""
        if slab_bytes <= 0 or slab_bytes % self._driver.granularity:
            raise InvalidArgument(f"a slab of {slab_bytes} bytes is not a positive multiple of {self._driver.granularity}")
        self._provide, self._slab = provide, slab_bytes

    @property
    def length(self) -> int:
        """Bytes from ``base`` that are backed by allocations."""
        return self._segments[-1].end if self._segments else 0

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """What is mapped, in order."""
        return tuple(segment.allocation for segment in self._segments)

    @property
    def mapped(self) -> bool:
        """Whether the addresses can be used now; False between `unmap` and `remap`."""
        return self._mapped and not self._closed

    def address(self, offset: int) -> Address:
        """The address of a byte of the arena.

        Raises:
            InvalidArgument: The offset lies outside what is backed.
        """
        if not 0 <= offset <= self.length:
            raise InvalidArgument(f"offset {offset} is outside the arena's {self.length} bytes")
        return Address(self.base + offset)

    def contains(self, address: int, size: int = 1) -> bool:
        """Whether a range of addresses lies in the backed part."""
        return self.base <= address and address + size <= self.base + self.length

    def allocate(self, size: int, alignment: int = 512) -> int:
        """Give out the next bytes, extending the arena by whole slabs where it must.

        Args:
            size: Bytes.
            alignment: Of the offset; the base itself is aligned to the driver's granularity.

        Returns:
            The offset of the first byte.

        Raises:
            OutOfMemory: The server has no room, or the reserved addresses are used up.
        """
        start = round_up(self.used, alignment)
        missing = start + size - self.length
        if missing > 0:
            self._extend([self._slab] * (-(-missing // self._slab)) if self._slab else [round_up(missing, self._driver.granularity)])
        self.used = start + size
        return start

    def reserve_exact(self, size: int) -> None:
        """Back ``size`` more bytes than are used now, with slabs of which the last is as short as it can be."""
        missing = round_up(self.used + size, self._driver.granularity) - self.length
        if missing > 0:
            whole, rest = divmod(missing, self._slab) if self._slab else (0, missing)
            self._extend([self._slab] * whole + [rest] * bool(rest))

    def back(self, places: Sequence[tuple[int, int]]) -> None:
        """Back an empty arena by allocations of just these offsets and sizes, as an arena had them that was saved; all of it is used then.

        Args:
            places: Offset and bytes of each, in order.

        Raises:
            InvalidArgument: The arena has memory already or is read-only, or the driver has no such sizes and offsets.
            ManifestError: They are not in order, or overlap.
            ArenaTooSmall: They are over what the device has in all.
            OutOfMemory: The server has no room. Nothing is mapped; what it had made already stays in the draft, and goes with that.
        """
        self._check_usable()
        if self._provide is None or self._segments:
            raise InvalidArgument("only an empty arena that can grow is backed by given allocations")
        if any(number % self._driver.granularity for place in places for number in place):
            raise InvalidArgument(f"allocations of a saved layout are not at multiples of {self._driver.granularity} bytes")
        check_allocations([Allocation(0, offset, size) for offset, size in places])
        if places and sum(places[-1]) > self.capacity:
            raise ArenaTooSmall(f"{sum(places[-1])} bytes are over the arena's {self.capacity} bytes, which is all that the device has")
        provide, sizes, offsets = self._provide, [size for _, size in places], iter([offset for offset, _ in places])

        def receive(take: Take) -> None:
            for first in range(0, len(sizes), MOST_AT_ONCE):
                provide(sizes[first : first + MOST_AT_ONCE], take)

        self.adopt(receive, lambda _: next(offsets))
        self.used = self.length

    def _extend(self, sizes: Sequence[int]) -> None:
        self._check_usable()
        if self._provide is None:
            raise InvalidArgument("this arena is read-only and cannot grow")
        if self.length + sum(sizes) > self.capacity:
            raise OutOfMemory(f"{sum(sizes)} more bytes are over the arena's {self.capacity} bytes, which is all that the device has")
        provide, offsets = self._provide, accumulate(sizes, initial=self.length)
        self.adopt(lambda take: provide(sizes, take), lambda _: next(offsets))

    def adopt(self, receive: Receive, place: Callable[[Received], int]) -> None:
        """Map allocations with the arena's access, or none of them.

        Args:
            receive: Gets them.
            place: Tells the offset of each, in the order in which they come.
        """
        driver = self._driver
        added: list[Segment] = []
        with UndoStack() as undo:

            def take(received: Sequence[Received]) -> None:
                for item in received:
                    offset = place(item)
                    handle = driver.import_descriptor(item.descriptor, item.size)
                    undo.push(driver.release, handle)
                    driver.map(Address(self.base + offset), item.size, handle)
                    undo.push(driver.unmap, Address(self.base + offset), item.size)
                    added.append(Segment(Allocation(item.id, offset, item.size), handle))

            receive(take)
            grant(driver, self.base, added, self._access)
            undo.commit()
        self._segments = sorted([*self._segments, *added], key=lambda segment: segment.allocation.offset)

    def set_access(self, access: Access) -> None:
        """Change the right to all that is mapped, once the device has finished this process's work."""
        self._check_usable()
        before, self._access = self._access, access
        self._driver.synchronize()
        try:
            grant(self._driver, self.base, self._segments, self._access)
        except BaseException:
            self._access = before
            raise

    def drop_unused(self) -> list[int]:
        """Unmap the allocations that lie wholly behind the used bytes; returns their ids."""
        dropped = []
        while self._segments and (last := self._segments[-1]).allocation.offset >= self.used:
            self._driver.unmap(Address(self.base + last.allocation.offset), last.allocation.size)
            self._segments.pop()
            dropped.append(last.allocation.id)
            self._driver.release(last.handle)
        return dropped

    def trim_last(self) -> int | None:
        """Replace the last slab by an allocation that is just long enough, at the same address, and copy what is used of it.

        Returns:
            The id of the slab that is no longer mapped, or None when there was nothing to gain.

        Raises:
            OutOfMemory: The server has no room for the copy; the arena is as it was.
        """
        if not self._segments or self._provide is None:
            return None
        last = self._segments[-1]
        offset = last.allocation.offset
        size = round_up(self.used - offset, self._driver.granularity)
        if size >= last.allocation.size:
            return None
        driver, address = self._driver, Address(self.base + offset)
        driver.synchronize()
        with UndoStack() as undo:
            shorter: list[Segment] = []

            def take(received: Sequence[Received]) -> None:
                for item in received:
                    handle = driver.import_descriptor(item.descriptor, size)
                    undo.push(driver.release, handle)
                    shorter.append(Segment(Allocation(item.id, offset, size), handle))

            self._provide([size], take)
            (segment,) = shorter
            with UndoStack() as aside:
                beside = driver.reserve(size)
                aside.push(driver.free_reservation, beside, size)
                driver.map(beside, size, segment.handle)
                aside.push(driver.unmap, beside, size)
                driver.set_access(beside, size, Access.READ_WRITE)
                driver.copy(beside, address, size)
            driver.unmap(address, last.allocation.size)
            undo.push(self._put_back, last)
            driver.map(address, size, segment.handle)
            undo.push(driver.unmap, address, size)
            driver.set_access(address, size, self._access)
            undo.commit()
        driver.release(last.handle)
        self._segments[-1] = segment
        return last.allocation.id

    def _put_back(self, segment: Segment) -> None:
        address = Address(self.base + segment.allocation.offset)
        self._driver.map(address, segment.allocation.size, segment.handle)
        self._driver.set_access(address, segment.allocation.size, self._access)

    def stop_growing(self) -> None:
        """From now on the arena is what it is."""
        self._provide = None

    def unmap(self) -> None:
        """Give up access and mappings; addresses and memory stay. Idempotent."""
        self._check_open()
        self._unmap_strays()
        if not self._mapped:
            return
        self._driver.synchronize()
        for start, end in runs(self._segments):
            self._driver.unmap(Address(self.base + start), end - start)
        self._mapped = False

    def remap(self) -> None:
        """Bind the same memory to the same addresses again. Idempotent."""
        self._check_open()
        if self._mapped:
            return
        self._unmap_strays()
        with UndoStack() as undo:
            for segment in self._segments:
                address = Address(self.base + segment.allocation.offset)
                self._driver.map(address, segment.allocation.size, segment.handle)
                undo.push(self._driver.unmap, address, segment.allocation.size)
            grant(self._driver, self.base, self._segments, self._access)
            undo.commit()
        self._mapped = True

    def replace(self, allocations: Sequence[Allocation], receive: ReceiveSome) -> None:
        """Bind the addresses to other allocations. Those of them that lie here already, at the same offset, are not touched.

        Everything that can fail before the old memory is unmapped does so before: the new memory is imported by then.

        Args:
            allocations: All that the arena has then, in order.
            receive: Gets those that it lacks.

        Raises:
            ArenaTooSmall: They do not fit into the reserved addresses.
            GmsError: The arena is as it was. If the old memory could not be mapped again either, it is unmapped, as by `unmap`, and the hint says so.
        """
        self._check_open()
        extent = max((allocation.offset + allocation.size for allocation in allocations), default=0)
        if extent > self.capacity:
            raise ArenaTooSmall(
                f"{extent} bytes do not fit into the {self.capacity} bytes of addresses that are reserved here",
                hint="Release the lease and acquire another one, or reserve more addresses when it is mapped first.",
            )
        here = {segment.allocation: segment for segment in self._segments}
        missing = {allocation.id: allocation for allocation in allocations if allocation not in here}
        driver, new, after = self._driver, list[Segment](), list[Segment]()
        exchange = Exchange(driver, self.base, self._access, self._segments)
        try:
            with UndoStack(kept=lambda: self._segments is after) as undo:

                def take(received: Sequence[Received]) -> None:
                    for item in received:
                        allocation = missing.pop(item.id, None)
                        if allocation is None:
                            raise ProtocolError(f"the server sent allocation {item.id}, which was not asked for, or sent it twice")
                        handle = driver.import_descriptor(item.descriptor, allocation.size)
                        undo.push(driver.release, handle)
                        new.append(Segment(allocation, handle))

                if missing:
                    receive(tuple(missing), take)
                if missing:
                    raise ProtocolError(f"the server did not send allocations {sorted(missing)[:5]}")
                kept = [here.pop(allocation) for allocation in allocations if allocation in here]
                after.extend(sorted([*kept, *new], key=lambda segment: segment.allocation.offset))
                if self._mapped:
                    exchange.carry_out([*here.values()], new, undo)
                self._segments = after
        except BaseException as error:
            if self._mapped and self._segments is not after and not exchange.is_undone:
                self._mapped = False
                self._strays += exchange.unmap_all()
                if isinstance(error, GmsError):
                    error.add_hint("The memory that was mapped before is not mapped any more; remap tries that again.")
            raise
        self.used = extent
        for segment in here.values():
            try:
                driver.release(segment.handle)
            except GmsError as error:  # a leak at worst; the arena has the other memory, and its owner must not hear that it has not
                log.error("allocation %d, which is not mapped any more, is not given up: %s", segment.allocation.id, error)

    def _unmap_strays(self) -> None:
        """Unmap what an exchange that failed could not unmap."""
        while self._strays:
            unmap(self._driver, self.base, self._strays[-1])
            self._strays.pop()

    def close(self) -> None:
        """Unmap everything and give the addresses back. Tensors that lie here must not be used any more. Idempotent."""
        if self._closed:
            return
        self.unmap()
        self._closed = True
        for segment in self._segments:
            self._driver.release(segment.handle)
        self._segments.clear()
        self._driver.free_reservation(self.base, self.capacity)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("the arena is closed")

    def _check_usable(self) -> None:
        self._check_open()
        if not self._mapped:
            raise SessionClosed("the arena is unmapped", hint="Call remap first.")
