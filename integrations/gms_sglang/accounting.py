"""Memory accounting beside neighbours: shared weights count as weights for every engine that uses them, whoever has brought them to the device.

SGLang measures what is free before it loads, keeps back a share of that for everything but weights and KV cache, and gives the KV cache what is free
after loading less that share (sglang/srt/mem_cache/kv_cache_configurator.py, _profile_available_bytes). Weights that were on the device before the
first measurement make the share too small, so they are added to it. A writer's weights come after it, as SGLang expects.
"""

from __future__ import annotations

from typing import Any

from gms_core.amounts import GIB
from gms_core.weights.holdings import Holding, all_kept
from gms_patches.for_sglang import ALLOC_MEMORY_POOL_BEFORE
from gms_sglang.hooks import Hook


def preloaded_bytes(holding: Holding) -> int:
    """Bytes of shared weights that were on the device when this engine measured what is free: not those that came while it waited for them."""
    return max(0, holding.external_bytes - max(0, holding.neighbours))


def _add_preloaded(runner: Any, *_: Any, **__: Any) -> None:
    """What later versions ask the loaders for themselves. A draft model's runner takes what the first one has left."""
    if not runner.is_draft_worker:
        runner.pre_model_load_memory += sum(map(preloaded_bytes, all_kept())) / GIB


HOOKS = (Hook(ALLOC_MEMORY_POOL_BEFORE, "before", _add_preloaded),)
