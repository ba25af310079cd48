"""Which blocks of the KV cache vLLM's scheduler gives out: those of the bridge alone, until the ranks may use all. Runs in the engine core.

The scheduler takes every block from one queue of free ones (vllm/v1/core/block_pool.py, ``BlockPool.free_block_queue``), so a block that is not in it
is in no request's table, and no step touches it. To everything that asks how large the cache is, it has the blocks of the bridge alone: what does not
fit waits, as in a cache that is full.
"""

from __future__ import annotations

import logging
from typing import Any

from gms_core.errors import EngineUnsupported

log = logging.getLogger("vllm.gms")

_WITHHELD = "gms_withheld"


def withhold(engine_core: Any, blocks: int) -> None:
    """Give out no block but the first ones. Nothing is being computed, and nothing is cached. Idempotent.

    Args:
        engine_core: VLLM's ``EngineCore``.
        blocks: How many.

    Raises:
        EngineUnsupported: This engine has another kind of cache, or blocks in use.
    """
    if getattr(engine_core, _WITHHELD, None) is not None:
        return
    pool = _pool(engine_core)
    found = [block for block in pool.free_block_queue.get_all_free_blocks() if block.block_id >= blocks]
    if not 1 < blocks <= pool.num_gpu_blocks or len(found) != pool.num_gpu_blocks - blocks:
        raise EngineUnsupported(
            f"a bridge of {blocks} blocks: of {pool.num_gpu_blocks} blocks {len(found)} could be withheld", hint='Set "bridge_bytes": 0.'
        )
    for block in found:
        pool.free_block_queue.remove(block)
    pool.num_gpu_blocks = blocks
    setattr(engine_core, _WITHHELD, found)


def complete(engine_core: Any) -> bool:
    """Have all ranks map all of their memory, and give out all blocks. Every rank has said ``gms_proven``. Idempotent.

    Returns:
        Whether that is so: not while the engine sleeps.
    """
    found = getattr(engine_core, _WITHHELD, None)
    if found is None:
        return True
    if not all(engine_core.collective_rpc("gms_complete")):
        return False
    pool = _pool(engine_core)
    pool.num_gpu_blocks += len(found)
    pool.free_block_queue.append_n(found)
    setattr(engine_core, _WITHHELD, None)
    log.info("all %d blocks of the KV cache can be used", pool.num_gpu_blocks)
    return True


def _pool(engine_core: Any) -> Any:
    manager = getattr(engine_core.scheduler, "kv_cache_manager", None)
    pool = getattr(manager, "block_pool", None)
    coordinator = getattr(manager, "coordinator", None)
    if pool is None or getattr(coordinator, "block_pool", pool) is not pool or getattr(coordinator, "gpu_pool", pool) is not pool:
        raise EngineUnsupported("a bridge: this engine's scheduler has no block pool, or several", hint='Set "bridge_bytes": 0.')
    return pool
