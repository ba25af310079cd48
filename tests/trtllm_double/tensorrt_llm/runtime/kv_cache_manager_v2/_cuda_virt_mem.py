"""Chunks of memory, and addresses at which they are mapped one after the other. What CUDA's driver does there, GMS's for host memory does here."""

from gms_core.vmm import open_driver
from gms_core.vmm.driver import Access, Address

drv = open_driver("host")


class NativePhysMemAllocator:
    __slots__ = ("_outstanding_handles", "_size")

    def __init__(self, size):
        self._size = size
        self._outstanding_handles = set()

    def allocate(self):
        handle = drv.create(self._size)
        assert handle not in self._outstanding_handles
        self._outstanding_handles.add(handle)
        return handle

    def release(self, handle):
        self._outstanding_handles.remove(handle)
        drv.release(handle)


class PooledPhysMemAllocator:
    __slots__ = ("_native", "phys_mem_size")

    def __init__(self, phys_mem_size):
        self._native = NativePhysMemAllocator(phys_mem_size)
        self.phys_mem_size = phys_mem_size

    def create(self):
        return self._native.allocate()

    def close(self, handle):
        self._native.release(handle)


class VirtMem:
    __slots__ = ("_address", "_allocator", "_pm_stack", "_vm_size")

    def __init__(self, vm_size, phys_mem_allocator, init_num_phys_mem=0):
        assert vm_size % phys_mem_allocator.phys_mem_size == 0
        self._allocator = phys_mem_allocator
        self._vm_size = vm_size
        self._address = drv.reserve(vm_size)
        self._pm_stack = []
        self.extend(init_num_phys_mem)

    @property
    def phys_mem_size(self):
        return self._allocator.phys_mem_size

    def destroy(self):
        if self._vm_size:
            self.shrink(self.num_phys_mem)
            drv.free_reservation(self._address, self._vm_size)
            self._vm_size = 0

    def extend(self, num_phys_mem):
        for _ in range(num_phys_mem):
            self._push(self._allocator.create())

    def shrink(self, num_phys_mem):
        for _ in range(num_phys_mem):
            self._allocator.close(self._pop())

    def realloc(self, num_bytes):
        required = -(-num_bytes // self.phys_mem_size)
        if required > self.num_phys_mem:
            self.extend(required - self.num_phys_mem)
        elif required < self.num_phys_mem:
            self.shrink(self.num_phys_mem - required)

    def _push(self, phy_mem):
        pointer = Address(self._address + self.mapped_bytes)
        assert self.mapped_bytes + self.phys_mem_size <= self._vm_size
        drv.map(pointer, self.phys_mem_size, phy_mem)
        drv.set_access(pointer, self.phys_mem_size, Access.READ_WRITE)
        self._pm_stack.append(phy_mem)

    def _pop(self):
        drv.unmap(Address(self._address + self.mapped_bytes - self.phys_mem_size), self.phys_mem_size)
        return self._pm_stack.pop()

    @property
    def mapped_bytes(self):
        return self.phys_mem_size * self.num_phys_mem

    @property
    def virtual_bytes(self):
        return self._vm_size

    @property
    def num_phys_mem(self):
        return len(self._pm_stack)

    @property
    def address(self):
        return int(self._address)
