"""The allocator's callbacks, called through their C pointers as PyTorch does, on host memory: what they give out, take back and remember."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import pytest
import torch

from gms_core.errors import DriverError, OutOfMemory
from gms_core.pytorch.cuda_pool import SEGMENT, ArenaPool, give_out
from tests.unit.pytorch.arenas import MIB

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def pool_of(monkeypatch):
    """A pool without a GPU: what of PyTorch needs one is left out."""
    monkeypatch.setattr(torch._C, "_cuda_customAllocator", lambda malloc, free: (malloc, free), raising=False)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator: allocator)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def make(arena):
        pool = ArenaPool(arena, DEVICE)
        malloc, free = pool.mem_pool
        call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)(malloc)
        back = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)(free)
        return pool, lambda size, device=0: call(size, device, None), lambda address, size: back(address, size, 0, None)

    return make


def test_segments_are_reused_when_they_were_given_back(memory, pool_of):
    arena = memory.writable()
    pool, malloc, free = pool_of(arena)
    first, second = malloc(SEGMENT), malloc(10 * SEGMENT)
    assert [(address - arena.base) % SEGMENT for address in (first, second)] == [0, 0]
    assert arena.contains(second, 10 * SEGMENT)
    used = arena.used
    free(second, 10 * SEGMENT)
    assert malloc(4 * SEGMENT) == second
    assert give_out(arena, [3 * MIB]) == [second + 4 * SEGMENT - arena.base]
    assert arena.used == used
    assert pool.failure is None


def test_failure_is_kept_when_the_arena_cannot_grow(memory, pool_of):
    pool, malloc, _free = pool_of(memory.writable())
    memory.refuse = True
    assert malloc(SEGMENT) is None
    assert isinstance(pool.failure, OutOfMemory)
    memory.refuse = False
    address = malloc(SEGMENT)
    assert address
    assert pool.failure is None
    assert malloc(SEGMENT, 1) is None
    assert isinstance(pool.failure, DriverError)


def test_freeing_has_no_effect_when_the_arena_is_gone_or_the_range_is_foreign(memory, pool_of):
    pool, malloc, free = pool_of(memory.writable())
    address = malloc(SEGMENT)
    free(12345, SEGMENT)
    free(None, 0)
    memory.arenas.pop().close()
    gc.collect()
    free(address, SEGMENT)
    assert malloc(SEGMENT) is None
    assert "is gone" in str(pool.failure)
