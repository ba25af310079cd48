"""What KV memory is laid out for: only engines that agree in all of it can stand in for one another."""

from __future__ import annotations

from typing import Any

import vllm.envs as envs

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.kv.plan import FORMAT
from gms_core.layout import Identity
from gms_vllm.identity import expected_identity, model_place

_CACHE = (
    "block_size",
    "num_gpu_blocks_override",
    "enable_prefix_caching",
    "mamba_block_size",
    "mamba_cache_dtype",
    "mamba_ssm_cache_dtype",
    "mamba_cache_mode",
    "kv_sharing_fast_prefill",
)
"""Fields of ``CacheConfig`` that alter blocks, their number or their layout. Not the budget: that is the plan's to say."""

_OF_THE_WEIGHTS = frozenset({"content", "load"})
"""Fields of the weights' identity that say nothing of the KV memory. The pool of the weights sees to it that engines have the same ones."""


def kv_identity(config: Any, options: GmsConfig, failover: FailoverConfig) -> Identity:
    """The identity of the KV memory of this rank. To be asked before loading, which changes the configuration.

    Args:
        config: A ``VllmConfig``.
        options: The engine's block.
        failover: How it fails over.
    """
    weights = expected_identity(config, config.model_config, content="", extra=options.identity).fields
    fields = {**{name: value for name, value in weights.items() if name not in _OF_THE_WEIGHTS}, **kv_fields(config, options, failover)}
    return Identity({name: value for name, value in fields.items() if value})


def kv_fields(config: Any, options: GmsConfig, failover: FailoverConfig) -> dict[str, str]:
    """The fields that weights do not have.

    Args:
        config: A ``VllmConfig``.
        options: The engine's block.
        failover: How it fails over.
    """
    cache, scheduler = config.cache_config, config.scheduler_config
    values = {name: getattr(cache, name, None) for name in _CACHE}
    return {
        **{f"kv_{name}": str(value) for name, value in values.items() if value is not None},
        "kv_plan": FORMAT,
        "kv_layout": str(envs.VLLM_KV_CACHE_LAYOUT or ""),
        "kv_hybrid_manager": str(not scheduler.disable_hybrid_kv_cache_manager),
        "kv_model_runner": "2" if config.use_v2_model_runner else "1",
        "speculative": _speculative(config.speculative_config),
        "weights": options.tag,
        "lock": failover.lock,  # engines of another lock would wait for memory that nobody is going to leave to them
    }


def _speculative(speculative: Any) -> str:
    if speculative is None:
        return ""
    draft = speculative.draft_model_config
    return f"{speculative.method} {speculative.num_speculative_tokens} {model_place(draft) if draft is not None else ''}".strip()
