"""The ``cuda`` driver: the CUDA driver API's virtual memory management, with POSIX descriptors.

Creating, exporting, importing, reserving, mapping and setting access need no context on the device; only `read`, `write`, `copy` and, where there
is work to wait for, `synchronize` use the device's primary context, the one that PyTorch uses too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gms_core.devices import DeviceId, free_bytes
from gms_core.errors import AllocationTooLarge, DriverError, DriverUnavailable
from gms_core.vmm.address_space import AddressSpace, Mapping, describe
from gms_core.vmm.cuda_calls import attribute, checked, cuda, device_name, find_device
from gms_core.vmm.driver import Access, Address, Descriptor, Handle, MemoryInfo
from gms_core.vmm.undo import UndoStack

_POSIX = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_FLAGS = {
    Access.NONE: cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_NONE,
    Access.READ: cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ,
    Access.READ_WRITE: cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
}


_ADOPTED = 0
"""In place of CUDA's handle, for memory that this process has a descriptor of alone."""


@dataclass(frozen=True, eq=False, slots=True)
class _Memory:
    """Physical memory.

    Attributes:
        handle: What CUDA calls it. Two imports of one descriptor may get the same number.
        created: By this driver, not imported.
    """

    handle: int
    size: int
    created: bool


class CudaDriver:
    """Driver of one GPU, or of one MIG instance.

    Each call is safe from any thread. Mappings outlive `close`: whoever still has a tensor there reads memory, not a fault.

    Args:
        device: UUID, as NVML writes it. The process must see it, whatever its ordinal is here.

    Raises:
        DeviceNotFound: This process does not see it.
        DriverUnavailable: Driver, bindings or a capability of the GPU is missing.
    """

    name = "cuda"

    def __init__(self, device: DeviceId) -> None:
        self.device_id = device
        self._device = find_device(device)
        _check_capabilities(self._device)
        self._properties = self._allocation_properties()
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granularity = int(checked("cuMemGetAllocationGranularity", self._properties, minimum))
        self._total = int(checked("cuDeviceTotalMem", self._device))
        self._space: AddressSpace[_Memory] = AddressSpace(self._granularity)
        self._handles: dict[Handle, _Memory] = {}
        self._numbers = itertools.count(1)
        self._context: Any = None
        self._lock = threading.RLock()

    @property
    def granularity(self) -> int:
        """See `PhysicalDriver.granularity`."""
        return self._granularity

    def create(self, size: int) -> Handle:
        """See `PhysicalDriver.create`."""
        self._space.check_size(size)
        if size > self._total:
            raise AllocationTooLarge(f"{size} bytes can never fit: the device has {self._total}")
        return self._add(_Memory(int(checked("cuMemCreate", size, self._properties, 0, about=f"{size} bytes")), size, created=True))

    def adopt(self, descriptor: Descriptor, size: int) -> Handle:  # noqa: ARG002 - the protocol's
        """See `PhysicalDriver.adopt`. CUDA is not asked: the descriptor is all that a server needs of memory that it maps nowhere."""
        self._space.check_size(size)
        return self._add(_Memory(_ADOPTED, size, created=False))

    def export(self, handle: Handle) -> Descriptor:
        """See `PhysicalDriver.export`."""
        memory = self._memory(handle)
        if not memory.created:
            raise DriverError("imported memory cannot be exported again", hint="Duplicate the descriptor that it was imported from.")
        descriptor = int(checked("cuMemExportToShareableHandle", memory.handle, _POSIX, 0, about=f"{memory.size} bytes"))
        os.set_inheritable(descriptor, False)
        return Descriptor(descriptor)

    def release(self, handle: Handle) -> None:
        """See `PhysicalDriver.release`."""
        with self._lock:
            memory = self._memory(handle)
            if memory.handle != _ADOPTED:
                checked("cuMemRelease", memory.handle, about=f"{memory.size} bytes")
            del self._handles[handle]

    def seal(self, handle: Handle) -> bool:
        """See `PhysicalDriver.seal`. CUDA has no such thing: read-only sharing is a right of the mapping, among processes that cooperate."""
        self._memory(handle)
        return False

    @property
    def total_bytes(self) -> int:
        """See `PhysicalDriver.total_bytes`."""
        return self._total

    def memory_info(self) -> MemoryInfo:
        """See `PhysicalDriver.memory_info`. NVML tells what is free, since CUDA itself would need a context for that."""
        return MemoryInfo(free=min(free_bytes(self.device_id), self._total), total=self._total)

    def close(self) -> None:
        """See `PhysicalDriver.close`. Idempotent."""
        with self._lock, UndoStack() as undo:
            if self._context is not None:
                undo.push(checked, "cuDevicePrimaryCtxRelease", self._device)
                self._context = None
            for handle in list(self._handles):
                undo.push(self.release, handle)

    def import_descriptor(self, descriptor: Descriptor, size: int) -> Handle:
        """See `Driver.import_descriptor`. CUDA cannot tell the size; a wrong one is refused by `map`."""
        self._space.check_size(size)
        try:
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
        except OSError as error:
            raise DriverError(f"descriptor {descriptor} is not memory of the cuda driver: {error.strerror}") from error
        about = f"{size} bytes, descriptor {descriptor}"
        return self._add(_Memory(int(checked("cuMemImportFromShareableHandle", descriptor, _POSIX, about=about)), size, created=False))

    def reserve(self, size: int) -> Address:
        """See `Driver.reserve`."""
        self._space.check_size(size)
        with self._lock:
            address = Address(int(checked("cuMemAddressReserve", size, 0, 0, 0, about=f"{size} bytes")))
            self._space.add_reservation(address, size)
        return address

    def free_reservation(self, address: Address, size: int) -> None:
        """See `Driver.free_reservation`."""
        with self._lock:
            self._space.check_reservation(address, size)
            checked("cuMemAddressFree", address, size, about=describe(address, size))
            self._space.remove_reservation(address)

    def map(self, address: Address, size: int, handle: Handle) -> None:
        """See `Driver.map`."""
        with self._lock:
            memory = self._memory(handle)
            self._space.check_free(address, size)
            if size != memory.size:
                raise DriverError(f"memory of {memory.size} bytes is mapped whole, not {size} bytes of it")
            _map(address, size, memory.handle)
            self._space.add(Mapping(address, size, memory))

    def unmap(self, address: Address, size: int) -> None:
        """See `Driver.unmap`."""
        with self._lock, UndoStack() as undo:
            mappings = self._space.whole(address, size)
            # One call for each mapping: CUDA documents cuMemUnmap for the range of one cuMemMap.
            for mapping in mappings:
                checked("cuMemUnmap", mapping.address, mapping.size, about=describe(mapping.address, mapping.size))
                undo.push(self._map_again, mapping)
            self._space.remove(mappings)
            undo.commit()

    def set_access(self, address: Address, size: int, access: Access) -> None:
        """See `Driver.set_access`."""
        with self._lock:
            mappings = self._space.whole(address, size)
            self._grant(address, size, access)
            for mapping in mappings:
                mapping.access = access

    def read(self, address: Address, size: int) -> bytes:
        """See `Driver.read`."""
        self._check_access(address, size, Access.READ)
        if not size:
            return b""
        buffer = ctypes.create_string_buffer(size)
        with self._current_context():
            checked("cuMemcpyDtoH", ctypes.addressof(buffer), address, size, about=describe(address, size))
        return buffer.raw

    def write(self, address: Address, data: bytes) -> None:
        """See `Driver.write`."""
        self._check_access(address, len(data), Access.READ_WRITE)
        if not data:
            return
        buffer = ctypes.create_string_buffer(data, len(data))
        with self._current_context():
            checked("cuMemcpyHtoD", address, ctypes.addressof(buffer), len(data), about=describe(address, len(data)))
            checked("cuCtxSynchronize")

    def copy(self, target: Address, source: Address, size: int) -> None:
        """See `Driver.copy`."""
        self._check_access(source, size, Access.READ)
        self._check_access(target, size, Access.READ_WRITE)
        if not size:
            return
        with self._current_context():
            checked("cuMemcpyDtoD", target, source, size, about=f"{describe(source, size)} to {target:#x}")
            checked("cuCtxSynchronize")

    def synchronize(self) -> None:
        """See `Driver.synchronize`. A process without a context has given the device no work, and none is made for it."""
        _, active = checked("cuDevicePrimaryCtxGetState", self._device)
        if active:
            with self._current_context():
                checked("cuCtxSynchronize")

    @contextlib.contextmanager
    def _current_context(self) -> Iterator[None]:
        """Make the primary context current; it is kept until `close`, since making one takes a tenth of a second."""
        with self._lock:
            if self._context is None:
                self._context = checked("cuDevicePrimaryCtxRetain", self._device)
        with UndoStack() as undo:
            checked("cuCtxPushCurrent", self._context)
            undo.push(checked, "cuCtxPopCurrent")
            yield

    def _allocation_properties(self) -> Any:
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._device
        properties.requestedHandleTypes = _POSIX
        if attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED", self._device):
            # Network cards and storage reach the memory directly, as they reach memory of cuMemAlloc.
            properties.allocFlags.gpuDirectRDMACapable = 1
        return properties

    def _grant(self, address: Address, size: int, access: Access) -> None:
        right = cuda.CUmemAccessDesc()
        right.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        right.location.id = self._device
        right.flags = _FLAGS[access]
        checked("cuMemSetAccess", address, size, [right], 1, about=f"{describe(address, size)}, access {access.value!r}")

    def _map_again(self, mapping: Mapping[_Memory]) -> None:
        _map(mapping.address, mapping.size, mapping.memory.handle)
        if mapping.access is not Access.NONE:
            self._grant(mapping.address, mapping.size, mapping.access)

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
        with self._lock:
            if handle not in self._handles:
                raise DriverError(f"handle {handle} is not, or no longer, a handle of this driver")
            return self._handles[handle]


def _map(address: Address, size: int, handle: int) -> None:
    checked("cuMemMap", address, size, 0, handle, 0, about=describe(address, size))


def _check_capabilities(device: int) -> None:
    name = device_name(device)
    if not attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", device):
        raise DriverUnavailable(
            f"{name} has no virtual memory management in this driver",
            hint="It needs a GPU of the Pascal generation or newer and a current driver; a vGPU profile may lack it.",
        )
    if not attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED", device):
        raise DriverUnavailable(
            f"{name} cannot share memory by POSIX descriptors with this driver", hint="It needs Linux on the machine itself; WSL does not have it."
        )
