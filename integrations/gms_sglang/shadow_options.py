"""Options that put more into KV memory, or more behind it, than can be handed over from one engine to another."""

from __future__ import annotations

from gms_core.errors import EngineUnsupported
from gms_sglang.arguments import Option


def check_shadow(option: Option) -> None:
    """Refuse them. What depends on the model is refused once that is known (`gms_sglang.shadow`).

    Args:
        option: The engine's options.

    Raises:
        EngineUnsupported: Names the option.
    """
    refused = {
        "--enable-hierarchical-cache": option("enable_hierarchical_cache"),
        "--enable-hisparse": option("enable_hisparse"),
        "--enable-lmcache": option("enable_lmcache"),
        "--enable-unified-memory": option("enable_unified_memory"),
        "--pipeline-parallel-size": (option("pp_size") or 1) > 1,
        "--speculative-algorithm": option("speculative_algorithm"),
    }
    for name, found in refused.items():
        if found:
            raise EngineUnsupported(
                f"failover: an engine with {name} cannot hand its KV memory over",
                hint=f"Leave {name} out, or leave failover out of the block gms (and out of GMS_FAILOVER) for this engine.",
            )
