"""Which addresses of this process are reserved and mapped, and the rules that every driver keeps. It calls no driver.

A driver asks here first, then calls the kernel or the device, then records what has happened; so each refusal is the same sentence on every
driver, and a refused call has changed nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gms_core.errors import DriverError, InvalidArgument
from gms_core.vmm.driver import Access, Address

MemoryT = TypeVar("MemoryT")
"""A driver's record of physical memory."""


def describe(address: int, size: int) -> str:
    """A range of addresses in words."""
    return f"{size} bytes at {address:#x}"


@dataclass(slots=True)
class Mapping(Generic[MemoryT]):
    """Physical memory, whole, at reserved addresses."""

    address: Address
    size: int
    memory: MemoryT
    access: Access = Access.NONE

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


class AddressSpace(Generic[MemoryT]):
    """Reservations and mappings that one driver has made in this process."""

    def __init__(self, granularity: int) -> None:
        self._granularity = granularity
        self._reservations: dict[Address, int] = {}
        self._reserved: list[Address] = []
        self._mappings: dict[Address, Mapping[MemoryT]] = {}
        self._mapped: list[Address] = []

    def check_size(self, size: int) -> None:
        """Raise `InvalidArgument` unless ``size`` is a positive multiple of the granularity."""
        if size <= 0 or size % self._granularity:
            raise InvalidArgument(f"{size} bytes are not a positive multiple of the granularity, {self._granularity}")

    def add_reservation(self, address: Address, size: int) -> None:
        """Record a reservation."""
        self._reservations[address] = size
        bisect.insort(self._reserved, address)

    def check_reservation(self, address: Address, size: int) -> None:
        """Raise `DriverError` unless the range is a reservation, whole, with no mapping in it."""
        if self._reservations.get(address) != size:
            raise DriverError(f"{describe(address, size)} are not a reservation", hint="A reservation is given back whole.")
        if left := self._within(address, size):
            raise DriverError(f"the reservation of {describe(address, size)} still has {len(left)} mappings", hint="Unmap them first.")

    def remove_reservation(self, address: Address) -> None:
        """Record that a reservation was given back."""
        del self._reservations[address]
        self._reserved.remove(address)

    def check_free(self, address: Address, size: int) -> None:
        """Raise unless a mapping can be made there.

        Raises:
            InvalidArgument: The address or the size is no multiple of the granularity.
            DriverError: The range is not in one reservation, or a part of it is mapped.
        """
        self.check_size(size)
        if address % self._granularity:
            raise InvalidArgument(f"address {address:#x} is not a multiple of the granularity, {self._granularity}")
        at = bisect.bisect_right(self._reserved, address) - 1
        if at < 0 or address + size > self._reserved[at] + self._reservations[self._reserved[at]]:
            raise DriverError(f"{describe(address, size)} are not within one reservation")
        if taken := self._within(address, size):
            raise DriverError(f"{describe(address, size)} are mapped already: {describe(taken[0].address, taken[0].size)}")

    def add(self, mapping: Mapping[MemoryT]) -> None:
        """Record a mapping."""
        self._mappings[mapping.address] = mapping
        bisect.insort(self._mapped, mapping.address)

    def remove(self, mappings: Sequence[Mapping[MemoryT]]) -> None:
        """Record that neighbouring mappings are gone."""
        first = bisect.bisect_left(self._mapped, mappings[0].address)
        del self._mapped[first : first + len(mappings)]
        for mapping in mappings:
            del self._mappings[mapping.address]

    def whole(self, address: Address, size: int) -> list[Mapping[MemoryT]]:
        """The mappings that fill the range exactly, in order.

        Raises:
            InvalidArgument: The size is no positive multiple of the granularity.
            DriverError: The range cuts through a mapping, or a part of it is not mapped.
        """
        self.check_size(size)
        found = self._filling(address, size)
        if found[0].address != address or found[-1].end != address + size:
            cut = found[0] if found[0].address != address else found[-1]
            raise DriverError(f"{describe(address, size)} cut through the mapping of {describe(cut.address, cut.size)}", hint="Mappings are whole.")
        return found

    def check_access(self, address: Address, size: int, access: Access) -> None:
        """Raise `DriverError` unless all bytes of the range are mapped with the right to read, or to read and write."""
        enough = (Access.READ_WRITE,) if access is Access.READ_WRITE else (Access.READ, Access.READ_WRITE)
        for mapping in self._filling(address, size):
            if mapping.access not in enough:
                has, wanted = mapping.access.value, access.value
                raise DriverError(f"the mapping of {describe(mapping.address, mapping.size)} has access {has!r}, but {wanted!r} is needed")

    def _filling(self, address: Address, size: int) -> list[Mapping[MemoryT]]:
        """Mappings side by side that hold the whole range; they may reach over its ends."""
        found = self._within(address, size)
        reached = int(address)
        for mapping in found:
            if mapping.address > reached:
                break
            reached = mapping.end
        if not found or reached < address + size:
            raise DriverError(f"{describe(address, size)} are not all mapped: nothing is at {reached:#x}")
        return found

    def _within(self, address: Address, size: int) -> list[Mapping[MemoryT]]:
        """Mappings that share an address with the range, in order."""
        first = bisect.bisect_right(self._mapped, address) - 1
        if first < 0 or self._mappings[self._mapped[first]].end <= address:
            first += 1
        end = bisect.bisect_left(self._mapped, address + size, lo=first)
        return [self._mappings[start] for start in self._mapped[first:end]]
