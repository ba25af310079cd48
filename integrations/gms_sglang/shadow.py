"""The KV cache of an engine that can stand in for another one: planned once, on scratch memory until the promotion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig
from gms_core.engine_log import log
from gms_core.errors import EngineUnsupported
from gms_core.failover import cohort
from gms_core.failover.parent_death import end_with_parent
from gms_core.kv import planning
from gms_core.kv.planning import KvPlanning
from gms_core.layout import Identity
from gms_patches.for_sglang import CONFIGURE_KV_CACHE, PROFILE_AVAILABLE_BYTES
from gms_sglang.arguments import argument
from gms_sglang.hooks import Hook
from gms_sglang.kv_identity import kv_identity
from gms_sglang.kv_plan import budget_of, check_cap
from gms_sglang.kv_pools import WITHOUT, check_pool, pool_layout, values_of
from gms_sglang.place import all_ranks, connect, rank_pool, server_socket, world
from gms_sglang.rank import failover, options, this_rank


def begin(weights: Identity) -> None:
    """Take this process's place in the cohort, before it loads the model itself. Without failover it does nothing.

    Args:
        weights: Identity of the weights that are going to be loaded.

    Raises:
        EngineUnsupported: The engine has no cohort.
        GmsError: See `take_place`.
    """
    if failover() is None:
        return
    if not settings().cohort:
        raise EngineUnsupported(
            "failover: this engine was started in a way that GMS does not know, and has no cohort",
            hint="Start it with `python -m sglang.launch_server`, `sglang serve` or sglang.Engine().",
        )
    if not cohort.began_here():
        end_with_parent()
    take_place()
    this_rank().weights = weights


def take_place() -> Path:
    """Join this rank to its engine's cohort, anew if the server has been restarted; returns the server's socket.

    Raises:
        GmsError: The server is not there, or does not want this process.
    """
    config = options()
    socket = server_socket(config)
    cohort.take_place(f"rank {world().rank_in_group}", [socket], serves=False, connect_timeout_s=config.connect_timeout_s)
    return socket


def _configure(original: Callable[..., Any], configurator: Any, *, pre_model_load_memory: Any) -> Any:
    """Learn whether the KV cache is planned, have SGLang make it, and provide its memory, or make sure that it is what was planned."""
    config = failover()
    if config is None:
        return original(configurator, pre_model_load_memory=pre_model_load_memory)
    _check(configurator)
    begun = this_rank().planning = _plan(configurator, config)
    with begun.given_up_on_failure():
        if begun.plan is not None:
            check_cap(argument("max_total_tokens"), begun.plan.num_blocks * configurator.page_size, configurator.page_size, begun.pool.name)
        result = original(configurator, pre_model_load_memory=pre_model_load_memory)
        _initialise(configurator, result.token_to_kv_pool, result.max_total_num_tokens)
    return result


def _plan(configurator: Any, config: FailoverConfig) -> KvPlanning:
    rank, weights = world().rank_in_group, this_rank().weights
    if weights is None:
        raise EngineUnsupported("failover: this engine makes its KV cache before it loads its model", hint=WITHOUT)
    begun = planning.begin(
        connect(options()),
        rank_pool(config.kv_tag),
        kv_identity(weights, configurator.page_size, options(), config),
        tag=config.kv_tag,
        rank=rank,
        ranks=all_ranks(),
        timeout_s=options().acquire_timeout_s,
    )
    if begun.memory_bytes is not None:
        log().info("%d bytes of KV memory are planned: nothing is measured, and --mem-fraction-static is not used", begun.memory_bytes)
    return begun


def _initialise(configurator: Any, pool: Any, tokens: int) -> None:
    rank = this_rank()
    check_pool(pool, None if rank.kv is None else rank.kv.memory)
    assert rank.kv is not None
    page_size = configurator.page_size
    budget = budget_of(values_of(pool), tokens, page_size)
    if (again := configurator.config_from_budget(budget).max_total_num_tokens) != tokens:
        raise EngineUnsupported(f"failover: a KV cache of {tokens} tokens would have {again} in the engine that takes it over", hint=WITHOUT)
    rank.kv.initialise(
        [],
        tokens // page_size,
        pool_layout(pool),
        measured=budget,
        explicit=argument("max_total_tokens") is not None,
        memory_timeout_s=options().memory_timeout_s,
    )


def _check(configurator: Any) -> None:
    """Refuse engines whose KV memory is more than the values of one cache, before any of it is allocated.

    Raises:
        EngineUnsupported: It is such an engine.
    """
    kinds = {
        "draft models": configurator.is_draft_worker or not configurator.spec_algorithm.is_none(),
        "sliding-window attention beside full attention": configurator.is_hybrid_swa,
        "a recurrent state": configurator.mambaish_config is not None,
        "a KV cache that is sized once CUDA graphs are captured": configurator.post_capture_kv_active,
    }
    for kind, found in kinds.items():
        if found:
            raise EngineUnsupported(f"failover: the KV memory of engines with {kind} cannot be handed over", hint=WITHOUT)


def _budget(original: Callable[..., int], configurator: Any, pre_model_load_memory: Any) -> int:
    """Bytes for the KV cache: those of the plan, if there is one, else what SGLang measures."""
    begun = this_rank().planning
    if begun is None or begun.memory_bytes is None:
        return original(configurator, pre_model_load_memory)
    return begun.memory_bytes


HOOKS = (Hook(CONFIGURE_KV_CACHE, "around", _configure), Hook(PROFILE_AVAILABLE_BYTES, "around", _budget))
