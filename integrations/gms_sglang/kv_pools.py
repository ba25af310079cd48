"""SGLang's KV pools, as far as they may lie on memory that other pages share, and where their tensors are.

What these pools allocate are values, which nothing reads that no request has written. Everything else that has SGLang's tag for KV memory (tables of
slots, states, indices of compressed caches) lies in memory of this rank's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from gms_core.errors import EngineUnsupported
from gms_core.kv.retained import RetainedKv
from gms_patches.for_sglang import CREATE_MHA_BUFFERS, CREATE_MLA_BUFFERS
from gms_sglang.hooks import Hook
from gms_sglang.kv_plan import Values, layout_of
from gms_sglang.memory_saver import placing
from gms_sglang.rank import failover, this_rank

WITHOUT = "Leave failover out of the block gms (and out of GMS_FAILOVER) for this engine."
_KNOWN = (MHATokenToKVPool, MLATokenToKVPool)
"""Exactly these: what others derive from them has more in it."""


def tensors_of(pool: Any) -> list[torch.Tensor]:
    """All tensors of one of the pools that are known."""
    return [*pool.k_buffer, *pool.v_buffer] if type(pool) is MHATokenToKVPool else list(pool.kv_buffer)


def values_of(pool: Any) -> list[Values]:
    """Their shapes."""
    return [Values(tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch."), tensor.nbytes) for tensor in tensors_of(pool)]


def pool_layout(pool: Any) -> str:
    """As `gms_sglang.kv_plan.layout_of`."""
    names = ("page_size", "dtype", "store_dtype", "start_layer", "layer_num")
    return layout_of({"pool": type(pool).__name__, **{name: getattr(pool, name) for name in names}}, values_of(pool))


def check_pool(pool: Any, memory: RetainedKv | None) -> None:
    """Make sure that a KV cache lies where it is to be, all of it.

    Args:
        pool: What SGLang has made.
        memory: Where it is to be; None if nothing was asked for.

    Raises:
        EngineUnsupported: It is of another kind than those that are known, or lies elsewhere.
    """
    if type(pool) not in _KNOWN:
        raise EngineUnsupported(f"failover: a KV cache of the kind {type(pool).__name__} cannot be handed over", hint=WITHOUT)
    if memory is None or not all(_lies_in(tensor, memory) for tensor in tensors_of(pool)):
        raise EngineUnsupported(f"failover: this {type(pool).__name__} makes its buffers in a way that GMS does not know", hint=WITHOUT)


def _lies_in(tensor: torch.Tensor, memory: RetainedKv) -> bool:
    storage = tensor.untyped_storage()
    return bool(memory.arena.base <= storage.data_ptr() and storage.data_ptr() + storage.nbytes() <= memory.arena.base + memory.size)


def _create(original: Callable[[Any], None], pool: Any) -> None:
    """Make a pool's tensors, at addresses of their own if the engine fails over."""
    config, rank = failover(), this_rank()
    if config is None or rank.planning is None or type(pool) not in _KNOWN:
        original(pool)
        return
    if rank.kv is not None:
        raise EngineUnsupported("failover: this engine has a second KV cache, which cannot be handed over", hint=WITHOUT)
    memory = rank.hold_retained(_sizes(original, pool), config)
    with placing(memory.place):
        original(pool)


def _sizes(original: Callable[[Any], None], pool: Any) -> list[int]:
    """Bytes of each buffer that a pool makes: found by having it make them without memory."""
    device, pool.device = pool.device, "meta"
    try:
        original(pool)
    finally:
        pool.device = device
    storages = [tensor.untyped_storage() for tensor in tensors_of(pool)]
    return list({storage._cdata: storage.nbytes() for storage in storages}.values())  # noqa: SLF001 - from 0.5.21 on K and V share one


HOOKS = (Hook(CREATE_MHA_BUFFERS, "around", _create), Hook(CREATE_MLA_BUFFERS, "around", _create))
