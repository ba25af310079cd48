"""Which blocks of the KV cache vLLM's scheduler gives out: those of the bridge alone, until the ranks may use all. Runs in the engine core.

The scheduler takes every block from one queue of free ones (vllm/v1/core/block_pool.py, ``BlockPool.free_block_queue``), so a block that is not in it
is in no request's table, and no step touches it. To everything that asks how large the cache is, it has the blocks of the bridge alone: what does not
fit waits, as in a cache that is full.
"""

from __future__ import annotations

import logging
from typing import Any

from gms_core.failover.front_end.engine import Step

log = logging.getLogger("vllm.gms")

_WITHHELD = "gms_withheld"


def withhold(engine_core: Any, blocks: int) -> bool:
    """Give out no block but the first ones. Nothing is being computed, and nothing is cached. Idempotent.

    Args:
        engine_core: VLLM's ``EngineCore``.
        blocks: How many.

    Returns:
        Whether that is so. If not, as with another kind of cache or blocks in use, nothing has changed, and the log says why.
    """
    if getattr(engine_core, _WITHHELD, None) is not None:
        return True
    pool = _pool(engine_core)
    if pool is None:
        log.warning("no bridge: this engine's scheduler has no block pool, or several")
        return False
    found = [block for block in pool.free_block_queue.get_all_free_blocks() if block.block_id >= blocks]
    total, cached = pool.num_gpu_blocks, sum(block.block_hash is not None for block in found)
    if not 1 < blocks <= total or len(found) != total - blocks or cached:
        log.warning("no bridge of %d blocks: of %d, %d are free behind them, and %d of those are cached", blocks, total, len(found), cached)
        return False
    for block in found:
        pool.free_block_queue.remove(block)
    pool.num_gpu_blocks = blocks
    setattr(engine_core, _WITHHELD, found)
    return True


def give_all(engine_core: Any) -> tuple[Step, str]:
    """Have all ranks map all of their memory, and give out all blocks, as soon as every rank may have all. To be called again until then. Idempotent.

    Returns:
        What it has come to, and the reason in words if it has failed.
    """
    found = getattr(engine_core, _WITHHELD, None)
    if found is None:
        return "whole", ""
    answers = engine_core.collective_rpc("gms_proven")
    if failures := [reason for state, reason in answers if state == "failed"]:
        return "failed", failures[0]
    if any(state != "proven" for state, _ in answers):
        return "waiting", ""
    if not all(engine_core.collective_rpc("gms_map_rest")):
        return "asleep", ""
    pool = _pool(engine_core)
    pool.num_gpu_blocks += len(found)
    pool.free_block_queue.prepend_n(found)  # before those of the bridge, which may be cached
    setattr(engine_core, _WITHHELD, None)
    log.info("all %d blocks of the KV cache can be used", pool.num_gpu_blocks)
    return "whole", ""


def _pool(engine_core: Any) -> Any:
    """The one block pool of the scheduler; None if there is none, or another one."""
    manager = getattr(engine_core.scheduler, "kv_cache_manager", None)
    pool = getattr(manager, "block_pool", None)
    coordinator = getattr(manager, "coordinator", None)
    others = (getattr(coordinator, "block_pool", pool), getattr(coordinator, "gpu_pool", pool))
    return pool if all(other is pool for other in others) else None
