"""Addresses of GMS's for the KV cache manager V2, as far as that is Python: what takes the place of its virtual memory while a cache is made.

V2 reserves a range of addresses for each pool of a cache, far more than it needs, and maps chunks of memory there, one after the other. Here all
pools of a cache lie side by side in one range, whose memory is not theirs: all of it is mapped, or all of it is scratch. They have their addresses
once somebody asks for the first one: by then every pool of the cache has its size.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from gms_core.engine_log import log
from gms_core.errors import EngineUnsupported, OutOfMemory
from gms_core.kv.retained import RetainedKv
from gms_patches.for_trtllm import GPU_STORAGE, PLACING, VIRTUAL_MEMORY
from gms_patches.guard import guard

_CLASS = "VirtMem"

Provide = Callable[[Sequence[int]], RetainedKv]
"""Makes the range for pools of so many bytes."""


def can_place() -> bool:
    """Whether this version has a V2 whose pools can be placed."""
    try:
        guard(PLACING)
        home, storage = _modules()
    except EngineUnsupported as error:
        log().info("KV memory is the engine's own: %s", error.message)
        return False
    compiled = [module.__name__ for module in (home, storage) if not str(module.__file__).endswith(".py")]
    if compiled or getattr(storage, _CLASS) is not getattr(home, _CLASS):
        log().info("KV memory is the engine's own: %s is compiled, or has another %s", ", ".join(compiled) or GPU_STORAGE, _CLASS)
        return False
    return True


@contextlib.contextmanager
def placing(provide: Provide) -> Iterator[None]:
    """Let caches that are made meanwhile have their pools in one range."""
    modules = _modules()
    original = getattr(modules[0], _CLASS)
    placed = partial(_PlacedMemory, _Pools(provide))
    for module in modules:
        setattr(module, _CLASS, placed)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, _CLASS, original)


def _modules() -> tuple[ModuleType, ModuleType]:
    return importlib.import_module(VIRTUAL_MEMORY), importlib.import_module(GPU_STORAGE)


class _Pools:
    """The pools of one cache."""

    def __init__(self, provide: Provide) -> None:
        self._provide = provide
        self._unplaced: list[_PlacedMemory] = []
        self._is_placed = False

    def add(self, pool: _PlacedMemory) -> None:
        """A pool that needs an address.

        Raises:
            EngineUnsupported: The others have theirs already.
        """
        if self._is_placed:
            raise EngineUnsupported(
                "failover: this engine has a second KV cache, which cannot be handed over",
                hint="Leave GMS_FAILOVER out for this engine, or use_kv_cache_manager_v2.",
            )
        self._unplaced.append(pool)

    def place(self) -> None:
        """Give all of them their addresses. Idempotent."""
        if self._is_placed:
            return
        self._is_placed = True
        memory = self._provide([pool.mapped_bytes for pool in self._unplaced])
        for pool in self._unplaced:
            pool.place(memory.place(pool.mapped_bytes))


class _PlacedMemory:
    """A pool's memory, with what V2 asks of its own ``VirtMem``."""

    def __init__(self, pools: _Pools, vm_size: int, phys_mem_allocator: Any, init_num_phys_mem: int = 0) -> None:
        self._pools = pools
        self.virtual_bytes = vm_size
        self.phys_mem_size = int(phys_mem_allocator.phys_mem_size)
        self.num_phys_mem = init_num_phys_mem
        self._room: int | None = None
        self._address = 0
        pools.add(self)

    def place(self, address: int) -> None:
        """It lies there from now on, and has no more room than it needs now."""
        self._address, self._room = address, self.num_phys_mem

    @property
    def address(self) -> int:
        self._pools.place()
        return self._address

    @property
    def mapped_bytes(self) -> int:
        return self.num_phys_mem * self.phys_mem_size

    def extend(self, num_phys_mem: int) -> None:
        if self._room is not None and self.num_phys_mem + num_phys_mem > self._room:
            raise OutOfMemory(
                f"a pool of the KV cache cannot grow beyond the {self._room} chunks that it has: engines that fail over have KV memory in common"
            )
        self.num_phys_mem += num_phys_mem

    def shrink(self, num_phys_mem: int) -> None:
        self.num_phys_mem -= num_phys_mem

    def realloc(self, num_bytes: int) -> None:
        more = -(-num_bytes // self.phys_mem_size) - self.num_phys_mem
        self.extend(more) if more > 0 else self.shrink(-more)

    def destroy(self) -> None:
        """The memory stays as long as the process, for whoever still computes on it."""
        self.virtual_bytes = self.num_phys_mem = 0
