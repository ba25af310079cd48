"""How a rank of vLLM's asks for the plan of its KV memory."""

from __future__ import annotations

import logging
from typing import Any

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.kv import planning
from gms_core.kv.planning import KvPlanning
from gms_vllm.kv_identity import kv_identity
from gms_vllm.kv_plan import check_explicit
from gms_vllm.place import all_ranks, connect, rank_pool

log = logging.getLogger("vllm.gms")


def begin(config: Any, options: GmsConfig, failover: FailoverConfig) -> KvPlanning:
    """Open the pool of this rank, and learn whether there is a plan. All ranks call it, once their device and their groups are set up.

    Args:
        config: A ``VllmConfig``.
        options: The engine's block.
        failover: How it fails over.

    Raises:
        ConfigurationError: The user wants another size than the plan's.
        GmsError: The server does not answer, or see `gms_core.kv.planning.begin`.
    """
    rank, identity = config.parallel_config.rank, kv_identity(config, options, failover)
    begun = planning.begin(
        connect(options, rank=rank),
        rank_pool(config, failover.kv_tag),
        identity,
        tag=failover.kv_tag,
        rank=rank,
        ranks=all_ranks(),
        timeout_s=options.acquire_timeout_s,
    )
    if begun.memory_bytes is not None:
        with begun.given_up_on_failure():
            check_explicit(config.cache_config.kv_cache_memory_bytes, begun.memory_bytes, begun.pool.name)
        log.info("%d bytes of KV memory are planned: nothing is measured, and --gpu-memory-utilization is not used", begun.memory_bytes)
    return begun
