"""Pools of slots: one address for each slot of a pool, and a pool for each kind of content."""

from tensorrt_llm.runtime.kv_cache_manager_v2._cuda_virt_mem import PooledPhysMemAllocator, VirtMem

TOTAL_GPU_MEMORY = 2**32


class GpuSlotPool:
    __slots__ = ("_slot_size", "_vm")

    def __init__(self, slot_size, vm_size, shared_phys_mem_pool, num_slots):
        self._slot_size = slot_size
        self._vm = VirtMem(vm_size, shared_phys_mem_pool)
        self.resize(num_slots)

    def destroy(self):
        self._vm.destroy()

    def resize(self, new_num_slots):
        self._vm.realloc(-(-new_num_slots * self._slot_size // self._vm.phys_mem_size) * self._vm.phys_mem_size)

    def slot_address(self, slot):
        return int(self._vm.address) + self._slot_size * slot

    @property
    def num_slots(self):
        return self._vm.num_phys_mem * self._vm.phys_mem_size // self._slot_size


class GpuPoolGroup:
    def __init__(self, num_slots, slot_size_list, shared_phys_mem_pool):
        largest = max(slot_size_list)
        chunk = shared_phys_mem_pool.phys_mem_size
        self._pools = [
            GpuSlotPool(size, TOTAL_GPU_MEMORY * size // largest // chunk * chunk, shared_phys_mem_pool, num_slots) for size in slot_size_list
        ]

    @property
    def num_slots(self):
        return min(pool.num_slots for pool in self._pools)

    def slot_address(self, slot):
        return tuple(pool.slot_address(slot) for pool in self._pools)

    def destroy(self):
        for pool in self._pools:
            pool.destroy()


class GpuCacheLevelStorage:
    def __init__(self, total_quota, slot_size_list, phys_mem_size):
        self.shared_phys_mem_pool = PooledPhysMemAllocator(phys_mem_size)
        chunks = total_quota // phys_mem_size // len(slot_size_list)
        self._group = GpuPoolGroup(chunks * phys_mem_size // max(slot_size_list), slot_size_list, self.shared_phys_mem_pool)

    @property
    def num_slots(self):
        return self._group.num_slots

    def slot_address(self, slot):
        return self._group.slot_address(slot)

    def destroy(self):
        self._group.destroy()
