"""Host memory that files are read into and written from: one mapping in huge pages, cut into buffers, and files mapped where they lie.

Huge pages do more for a transfer than any choice of I/O interface: with them the kernel pins a few pages for a read, not thousands.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

from gms_core.client.arena import round_up
from gms_core.errors import TransferFailed

HUGE_PAGE = 2 * 2**20

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
"""Linux 5.14: the pages are there when it returns, and what could not be read is an error instead of a signal."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_FAILED = ctypes.c_void_p(-1).value


class Buffer(NamedTuple):
    """A range of host memory.

    Attributes:
        number: Among its ring's buffers.
        address: Of its first byte.
        view: Its bytes. It keeps nothing mapped: whoever has a buffer has what it lies in.
    """

    number: int
    address: int
    view: memoryview


class Ring:
    """Buffers of one size in one mapping.

    Args:
        count: How many.
        size: Bytes of each, at least; a multiple of the page size.

    Raises:
        TransferFailed: The machine has no room.
    """

    def __init__(self, count: int, size: int) -> None:
        size = size if size < HUGE_PAGE else round_up(size, HUGE_PAGE)
        self.size = round_up(count * size, HUGE_PAGE)
        self.address = _aligned(self.size)
        _advise(self.address, self.size, mmap.MADV_HUGEPAGE)
        # A child that is forked while a device or a disk writes here must not turn these pages into copies.
        _advise(self.address, self.size, mmap.MADV_DONTFORK)
        self.buffers = tuple(Buffer(number, self.address + number * size, _view(self.address + number * size, size)) for number in range(count))
        self._closed = False

    def close(self) -> None:
        """Give the memory back. Nothing may be under way in it. Idempotent."""
        if not self._closed:
            self._closed = True
            _libc.munmap(self.address, self.size)


class MappedFile:
    """A file, mapped for reading where it lies, to be used in place.

    Args:
        descriptor: Open for reading; it can be closed afterwards.
        size: Bytes, which the file has.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._address = _mmap(size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor)
        self._closed = False

    def part(self, position: int, size: int) -> Buffer:
        """A part of the file."""
        return Buffer(-1, self._address + position, _view(self._address + position, size))

    def is_resident(self, position: int, size: int) -> bool:
        """Whether the kernel has a part in memory: all of a file that lies in memory, or what is in the page cache of another one."""
        return self.resident_pages(position, size) == -(-size // mmap.PAGESIZE)

    def resident_pages(self, position: int, size: int) -> int:
        """How many pages of a part the kernel has in memory; the part begins at a page."""
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        return 0 if _libc.mincore(self._address + position, size, found) else sum(bytes(found))

    def populate(self, position: int, size: int) -> bool:
        """Bind a part's pages to its addresses, so that nobody meets a fault there. Returns whether the kernel could."""
        return not _libc.madvise(self._address + position, size, _MADV_POPULATE_READ)

    def close(self) -> None:
        """Unmap the file. Idempotent."""
        if not self._closed:
            self._closed = True
            _libc.munmap(self._address, self.size)


def populate(buffers: Sequence[Buffer]) -> None:
    """Have the kernel find the pages of buffers now, by the thread that will use them and so near to it.

    Raises:
        TransferFailed: The machine has no room.
    """
    for buffer in buffers:
        size = len(buffer.view)
        if not _libc.madvise(buffer.address, size, _MADV_POPULATE_WRITE):
            continue
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            raise _no_room(size, number)
        ctypes.memset(buffer.address, 0, size)  # Linux before 5.14


def _aligned(size: int) -> int:
    """An anonymous mapping that begins at a huge page."""
    try:
        whole = _mmap(size + HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    except OSError as error:
        raise _no_room(size, error.errno or 0) from error
    address = round_up(whole, HUGE_PAGE)
    for begin, end in ((whole, address), (address + size, whole + size + HUGE_PAGE)):
        if begin < end:
            _libc.munmap(begin, end - begin)
    return address


def _mmap(size: int, protection: int, flags: int, descriptor: int) -> int:
    address = _libc.mmap(None, size, protection, flags, descriptor, 0)
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)


def _advise(address: int, size: int, advice: int) -> None:
    # Advice: a kernel without huge pages refuses it, and is slower.
    _libc.madvise(address, size, advice)


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _no_room(size: int, number: int) -> TransferFailed:
    return TransferFailed(
        f"the machine has no room for buffers of {size} bytes: {os.strerror(number)}", hint="Use fewer threads, or smaller or fewer buffers for each."
    )
