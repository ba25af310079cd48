"""KV caches, in which requests leave what later ones with the same tokens find again. What is kept of a token here is its number.

A token takes a block of its own, so that a prompt lies all over a cache.
"""

import collections
import ctypes
from enum import Enum

import torch
from tensorrt_llm import _double
from tensorrt_llm._torch import virtual_memory
from tensorrt_llm.runtime.kv_cache_manager_v2._storage._core import GpuCacheLevelStorage

TOKENS_PER_BLOCK = 4
BLOCK_BYTES = 2**14
BYTES_PER_TOKEN = BLOCK_BYTES // TOKENS_PER_BLOCK
CHUNK_BYTES = 2**16


class ResourceManagerType(Enum):
    KV_CACHE_MANAGER = "KV_CACHE_MANAGER"
    DRAFT_KV_CACHE_MANAGER = "DRAFT_KV_CACHE_MANAGER"


class _Manager:
    def _begin(self, blocks):
        assert blocks > 4, "no room for a KV cache"
        self.blocks_in_primary_pool = blocks
        self._free = collections.deque(range(blocks))
        self._reusable = {}

    def keep(self, tokens):
        """Keep these tokens, and return what is kept of them: those of an earlier request are used again."""
        found = self._reusable.get(tuple(tokens))
        if found is None:
            while len(self._free) < len(tokens):
                self._free.extend(self._reusable.pop(next(iter(self._reusable))))
            found = self._reusable[tuple(tokens)] = [self._free.popleft() for _ in tokens]
            for block, token in zip(found, tokens, strict=True):
                self._at(block).value = token
        return [self._at(block).value for block in found]

    def _at(self, block):
        return ctypes.c_int64.from_address(self._address(block))

    def reset_reuse_state(self):
        for blocks in self._reusable.values():
            self._free.extend(blocks)
        self._reusable = {}


class KVCacheManager(_Manager):
    """The first one: its memory is there as soon as it is, and belongs to the scope in which it was made."""

    def __init__(self, kv_cache_config):
        tokens = int(_double.mem_get_info()[0] * kv_cache_config.free_gpu_memory_fraction) // BYTES_PER_TOKEN
        if kv_cache_config.max_tokens is not None:
            tokens = min(tokens, kv_cache_config.max_tokens)
        self._memory = torch.zeros(tokens // TOKENS_PER_BLOCK * BLOCK_BYTES, dtype=torch.uint8)
        virtual_memory.owned.setdefault("kv_cache", {})[id(self)] = self._memory
        self._begin(tokens // TOKENS_PER_BLOCK)

    def _address(self, block):
        return self._memory.data_ptr() + block * BLOCK_BYTES

    def shutdown(self):
        del virtual_memory.owned["kv_cache"][id(self)]


class KVCacheManagerV2(_Manager):
    """The second one: keys and values have a pool each."""

    def __init__(self, kv_cache_config):
        self._storage = GpuCacheLevelStorage(kv_cache_config.max_gpu_total_bytes, [BLOCK_BYTES // 2, BLOCK_BYTES // 2], CHUNK_BYTES)
        self._addresses = [self._storage.slot_address(slot) for slot in range(self._storage.num_slots)]
        self._begin(len(self._addresses))

    def _address(self, block):
        return self._addresses[block][block % 2]

    def shutdown(self):
        self._storage.destroy()
