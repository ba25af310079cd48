"""What GMS asks of a memory driver: physical memory apart from virtual addresses.

The semantics are those of the CUDA driver's virtual memory management, and every driver keeps all of them, so that a mistake shows on any machine:

* physical memory is created, exported as a descriptor and imported elsewhere; it lives while any handle, descriptor or mapping refers to it;
* a reservation is a range of virtual addresses; a mapping binds one handle, whole, to a part of a reservation;
* a fresh mapping has no access until `set_access` grants it, and access is a right of the mapping, not of the memory;
* `unmap` covers whole mappings only and leaves the reservation in place.

A call that fails has changed nothing.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, NewType, Protocol

Address = NewType("Address", int)
"""A virtual address in this process."""

Handle = NewType("Handle", int)
"""A driver's name for physical memory, valid in this process alone."""

Descriptor = NewType("Descriptor", int)
"""An open file descriptor that refers to physical memory; whoever receives it closes it."""


class Access(enum.Enum):
    """The right of a mapping."""

    NONE = "none"
    READ = "read"
    READ_WRITE = "read_write"


class MemoryInfo(NamedTuple):
    """Bytes of the device's memory."""

    free: int
    total: int


class PhysicalDriver(Protocol):
    """The half that a server needs. It maps nothing and needs no context on the device."""

    @property
    def name(self) -> str:
        """``cuda`` or ``host``."""

    @property
    def granularity(self) -> int:
        """Bytes; sizes of memory and of reservations, and offsets of mappings, are multiples of it."""

    def create(self, size: int) -> Handle:
        """Create physical memory.

        Args:
            size: Bytes, a positive multiple of `granularity`.

        Raises:
            OutOfMemory: The device has no room now.
            AllocationTooLarge: The device can never have room.
        """

    def adopt(self, descriptor: Descriptor, size: int) -> Handle:
        """Take memory over that another process of the same device has created and exported. The descriptor stays the caller's.

        Raises:
            DriverError: It is not memory of this driver, where the driver can tell.
        """

    def export(self, handle: Handle) -> Descriptor:
        """Give a close-on-exec descriptor of memory that this driver created. The caller owns it."""

    def release(self, handle: Handle) -> None:
        """Give up the handle. The memory lives on while a descriptor, another handle or a mapping refers to it."""

    def seal(self, handle: Handle) -> bool:
        """Refuse every further writable mapping, in any process, where the kernel can. Returns whether it can."""

    @property
    def total_bytes(self) -> int:
        """Of the device in all. Unlike `memory_info`, it never has to load a library."""

    def memory_info(self) -> MemoryInfo:
        """Bytes of the device that are free, and in all."""

    def close(self) -> None:
        """Release every handle that is still held."""


class Driver(PhysicalDriver, Protocol):
    """Both halves: what a process needs that maps memory."""

    def import_descriptor(self, descriptor: Descriptor, size: int) -> Handle:
        """Make a handle of an exported descriptor. The descriptor stays the caller's.

        Raises:
            DriverError: It is not memory of this driver, or not of ``size`` bytes where the driver can tell.
        """

    def reserve(self, size: int) -> Address:
        """Reserve ``size`` bytes of virtual addresses."""

    def free_reservation(self, address: Address, size: int) -> None:
        """Give a reservation back, whole.

        Raises:
            DriverError: A mapping is left in it, or it is not a reservation.
        """

    def map(self, address: Address, size: int, handle: Handle) -> None:
        """Bind a handle, whole, to reserved addresses, without access.

        Raises:
            DriverError: The range is not reserved, is mapped already, or is not as long as the memory.
        """

    def unmap(self, address: Address, size: int) -> None:
        """Remove the mappings in a range; the reservation stays.

        Raises:
            DriverError: The range cuts through a mapping, or a part of it is not mapped.
        """

    def set_access(self, address: Address, size: int, access: Access) -> None:
        """Set the right of all mappings in a range.

        Raises:
            DriverError: The range cuts through a mapping, a part of it is not mapped, or the memory is sealed and ``access`` would write.
        """

    def read(self, address: Address, size: int) -> bytes:
        """Copy bytes out of mapped memory. For tests, checks and small values."""

    def write(self, address: Address, data: bytes) -> None:
        """Copy bytes into mapped memory. For tests, checks and small values."""

    def copy(self, target: Address, source: Address, size: int) -> None:
        """Copy between mapped ranges of this device, and wait until it is done."""

    def synchronize(self) -> None:
        """Wait until the device has finished the work that this process gave it."""
