"""The ``host`` driver: memory files (memfd) as physical memory, `mmap` as mapping. Real memory with real protection, on any Linux machine."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import stat
import threading
from dataclasses import dataclass

from gms_core.errors import AllocationTooLarge, DriverError, OutOfMemory
from gms_core.vmm.address_space import AddressSpace, Mapping, describe
from gms_core.vmm.driver import Access, Address, Descriptor, Handle, MemoryInfo
from gms_core.vmm.host_memory import Ledger, machine_memory
from gms_core.vmm.undo import UndoStack

_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MFD_NOEXEC_SEAL = 0x8
_F_SEAL_FUTURE_WRITE = 0x10
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PROTECTION = {Access.NONE: 0, Access.READ: mmap.PROT_READ, Access.READ_WRITE: mmap.PROT_READ | mmap.PROT_WRITE}
_NO_FILE = -1
_NO_ROOM = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EDQUOT})
_HINTS = {
    errno.ENOMEM: "Look at the limits vm.max_map_count and ulimit -v.",
    errno.EMFILE: "Raise the limit on open files, ulimit -n.",
    errno.EFBIG: "Raise the limit on the size of files, ulimit -f.",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


@dataclass(eq=False, slots=True)
class _Memory:
    """A memory file. It is open while the handle or a mapping refers to it.

    Attributes:
        entry: What the ledger calls it; None for memory that another process made.
        references: The handle, and each mapping.
    """

    descriptor: int
    size: int
    entry: int | None
    references: int = 1


def _mmap(address: int, size: int, protection: int, flags: int, descriptor: int) -> Address:
    mapped = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if mapped == _FAILED:
        raise _failure("mmap", ctypes.get_errno(), describe(address, size))
    return Address(mapped or 0)


def _failure(call: str, number: int, about: str) -> DriverError:
    return DriverError(f"{call} failed: {errno.errorcode.get(number, number)} ({os.strerror(number)}); {about}", hint=_HINTS.get(number, ""))


def _seals(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)


def _sealed(memory: _Memory) -> bool:
    # Asked of the kernel each time: it may be another process that has sealed it.
    return bool(_seals(memory.descriptor) & (_F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_WRITE))


def _memory_file(size: int) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(f"gms-{size}", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(f"gms-{size}", flags)  # Linux before 6.3


class HostDriver:
    """Driver of the ``host`` device.

    Each call is safe from any thread. Mappings outlive `close`: whoever still has a tensor there reads memory, not a fault.

    Args:
        capacity: Bytes that the device offers; None for all that the machine and its control groups allow.
    """

    name = "host"
    granularity = mmap.PAGESIZE

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._ledger = Ledger()
        self._space: AddressSpace[_Memory] = AddressSpace(self.granularity)
        self._handles: dict[Handle, _Memory] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    def create(self, size: int) -> Handle:
        """See `PhysicalDriver.create`. All pages are there when it returns: a later write never runs out of memory."""
        self._space.check_size(size)
        with UndoStack() as undo:
            try:
                with self._lock:
                    free, total = self.memory_info()
                    if size > total:
                        raise AllocationTooLarge(f"{size} bytes can never fit: the device has {total}")
                    if size > free:
                        raise OutOfMemory(f"no room for {size} bytes: {free} of {total} are free")
                    descriptor = _memory_file(size)
                    undo.push(os.close, descriptor)
                    entry = self._ledger.add(descriptor, size)
                    undo.push(self._ledger.closed, entry)
                # Without the lock: it takes long, and memory must be released meanwhile.
                os.ftruncate(descriptor, size)
                os.posix_fallocate(descriptor, 0, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise OutOfMemory(f"no room for {size} bytes: {error.strerror}") from error
                raise _failure("memfd", error.errno or 0, f"{size} bytes") from error
            undo.commit()
        return self._add(_Memory(descriptor, size, entry))

    def export(self, handle: Handle) -> Descriptor:
        """See `PhysicalDriver.export`."""
        with self._lock:
            memory = self._memory(handle)
            if memory.entry is None:
                raise DriverError("imported memory cannot be exported again", hint="Duplicate the descriptor that it was imported from.")
            return Descriptor(_duplicate(memory.descriptor))

    def release(self, handle: Handle) -> None:
        """See `PhysicalDriver.release`."""
        with self._lock:
            self._drop(self._memory(handle))
            del self._handles[handle]

    def seal(self, handle: Handle) -> bool:
        """See `PhysicalDriver.seal`. A writable mapping that exists stays writable until its access is set anew."""
        with self._lock:
            memory = self._memory(handle)
            if _sealed(memory):
                return True
            try:
                fcntl.fcntl(memory.descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EPERM):  # Linux before 5.1, or sealed otherwise by its maker
                    return False
                raise _failure("F_ADD_SEALS", error.errno or 0, f"{memory.size} bytes") from error
            return True

    @property
    def total_bytes(self) -> int:
        """See `PhysicalDriver.total_bytes`."""
        return self.memory_info().total

    def memory_info(self) -> MemoryInfo:
        """See `PhysicalDriver.memory_info`. Memory that this driver made counts until no process refers to it any more."""
        try:
            machine = machine_memory()
        except OSError as error:
            raise _failure("reading /proc/meminfo and control groups", error.errno or 0, str(error.filename)) from error
        total = machine.total if self._capacity is None else min(machine.total, self._capacity)
        return MemoryInfo(free=max(0, min(machine.free, total - self._ledger.used)), total=total)

    def close(self) -> None:
        """See `PhysicalDriver.close`. Idempotent."""
        with self._lock:
            for handle in list(self._handles):
                self.release(handle)
            self._ledger.close()

    def adopt(self, descriptor: Descriptor, size: int) -> Handle:
        """See `PhysicalDriver.adopt`. It counts as if this driver had made it."""
        self._check_foreign(descriptor, size)
        with UndoStack() as undo:
            own = _duplicate(descriptor)
            undo.push(os.close, own)
            entry = self._ledger.add(own, size)
            undo.commit()
        return self._add(_Memory(own, size, entry))

    def import_descriptor(self, descriptor: Descriptor, size: int) -> Handle:
        """See `Driver.import_descriptor`. Memory whose size another process could still change is refused: reading it could be a fault."""
        self._check_foreign(descriptor, size)
        return self._add(_Memory(_duplicate(descriptor), size, None))

    def _check_foreign(self, descriptor: Descriptor, size: int) -> None:
        self._space.check_size(size)
        try:
            found, seals = os.fstat(descriptor), _seals(descriptor)
        except OSError as error:
            raise DriverError(f"descriptor {descriptor} is not memory of the host driver: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode) or seals & _SIZE_SEALS != _SIZE_SEALS:
            raise DriverError(f"descriptor {descriptor} is not memory of the host driver: its size is not sealed")
        if found.st_size != size:
            raise DriverError(f"descriptor {descriptor} refers to {found.st_size} bytes, not to {size}")

    def reserve(self, size: int) -> Address:
        """See `Driver.reserve`."""
        self._space.check_size(size)
        with self._lock:
            address = _mmap(0, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, _NO_FILE)
            self._space.add_reservation(address, size)
        return address

    def free_reservation(self, address: Address, size: int) -> None:
        """See `Driver.free_reservation`."""
        with self._lock:
            self._space.check_reservation(address, size)
            if _libc.munmap(address, size):
                raise _failure("munmap", ctypes.get_errno(), describe(address, size))
            self._space.remove_reservation(address)

    def map(self, address: Address, size: int, handle: Handle) -> None:
        """See `Driver.map`."""
        with self._lock:
            memory = self._memory(handle)
            self._space.check_free(address, size)
            if size != memory.size:
                raise DriverError(f"memory of {memory.size} bytes is mapped whole, not {size} bytes of it")
            mapping = Mapping(address, size, memory)
            with UndoStack() as undo:
                # A replacing mmap that fails may already have removed what was there, and with it the reservation.
                undo.push(self._vacate, address, size)
                self._bind(mapping, Access.NONE)
                undo.commit()
            self._space.add(mapping)
            memory.references += 1

    def unmap(self, address: Address, size: int) -> None:
        """See `Driver.unmap`."""
        with self._lock:
            mappings = self._space.whole(address, size)
            self._vacate(address, size)
            self._space.remove(mappings)
            for mapping in mappings:
                self._drop(mapping.memory)

    def set_access(self, address: Address, size: int, access: Access) -> None:
        """See `Driver.set_access`."""
        with self._lock, UndoStack() as undo:
            mappings = self._space.whole(address, size)
            sealed = [_sealed(mapping.memory) for mapping in mappings]
            if access is Access.READ_WRITE and any(sealed):
                raise DriverError(f"{describe(address, size)} hold sealed memory, which cannot be made writable any more")
            for mapping, is_sealed in zip(mappings, sealed, strict=True):
                undo.push(self._protect, mapping, mapping.access)
                # A mapping from before the sealing could be made writable again by a plain mprotect; a new one can not.
                change = self._bind if is_sealed else self._protect
                change(mapping, access)
            for mapping in mappings:
                mapping.access = access
            undo.commit()

    def read(self, address: Address, size: int) -> bytes:
        """See `Driver.read`."""
        self._check_access(address, size, Access.READ)
        return ctypes.string_at(address, size)

    def write(self, address: Address, data: bytes) -> None:
        """See `Driver.write`."""
        self._check_access(address, len(data), Access.READ_WRITE)
        ctypes.memmove(address, data, len(data))

    def copy(self, target: Address, source: Address, size: int) -> None:
        """See `Driver.copy`."""
        self._check_access(source, size, Access.READ)
        self._check_access(target, size, Access.READ_WRITE)
        ctypes.memmove(target, source, size)

    def synchronize(self) -> None:
        """See `Driver.synchronize`. Nothing on this device runs apart from the threads that call it."""

    def _check_access(self, address: Address, size: int, access: Access) -> None:
        with self._lock:
            if size:
                self._space.check_access(address, size, access)

    def _add(self, memory: _Memory) -> Handle:
        with self._lock:
            handle = Handle(next(self._numbers))
            self._handles[handle] = memory
        return handle

    def _memory(self, handle: Handle) -> _Memory:
        if handle not in self._handles:
            raise DriverError(f"handle {handle} is not, or no longer, a handle of this driver")
        return self._handles[handle]

    def _drop(self, memory: _Memory) -> None:
        memory.references -= 1
        if memory.references == 0:
            os.close(memory.descriptor)
            if memory.entry is not None:
                self._ledger.closed(memory.entry)

    @staticmethod
    def _bind(mapping: Mapping[_Memory], access: Access) -> None:
        _mmap(mapping.address, mapping.size, _PROTECTION[access], mmap.MAP_SHARED | _MAP_FIXED, mapping.memory.descriptor)

    @staticmethod
    def _protect(mapping: Mapping[_Memory], access: Access) -> None:
        if _libc.mprotect(mapping.address, mapping.size, _PROTECTION[access]):
            raise _failure("mprotect", ctypes.get_errno(), describe(mapping.address, mapping.size))

    @staticmethod
    def _vacate(address: Address, size: int) -> None:
        """Put bare reserved addresses in the place of what is mapped."""
        _mmap(address, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, _NO_FILE)


def _duplicate(descriptor: int) -> int:
    try:
        return os.dup(descriptor)  # close-on-exec, as every descriptor that Python makes
    except OSError as error:
        raise _failure("dup", error.errno or 0, f"descriptor {descriptor}") from error
