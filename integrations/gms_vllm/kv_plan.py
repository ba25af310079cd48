"""What vLLM's configuration says to the plan of the KV memory. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from gms_core.errors import ConfigurationError


def layout_of(config: Any) -> str:
    """A digest of everything but sizes. It leaves out what is made anew in each process, such as functions that a specification refers to.

    Args:
        config: A ``KVCacheConfig``.
    """
    tensors = [{name: value for name, value in sorted(vars(tensor).items()) if name != "size"} for tensor in config.kv_cache_tensors]
    groups = [[list(group.layer_names), _specification(group.kv_cache_spec)] for group in config.kv_cache_groups]
    told = json.dumps([tensors, groups, getattr(config, "kv_cache_layout", None)], default=str)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def check_explicit(explicit: int | None, planned: int, pool: str) -> None:
    """Make sure that the user wants the budget of the plan, or has no wish.

    Args:
        explicit: What the user has said; None for nothing.
        planned: Of the plan.
        pool: Name of the pool, for the message.

    Raises:
        ConfigurationError: The user wants another size than the plan's.
    """
    if explicit and planned and explicit != planned:
        raise ConfigurationError(
            f"--kv-cache-memory-bytes {explicit} is not what pool {pool!r} was planned with: {planned}",
            hint="Leave the option out: engines that stand in for one another have the first one's KV memory. Or give this one another kv_tag.",
        )


def _specification(spec: Any) -> Mapping[str, object]:
    names = ("block_size", "page_size_bytes", "num_kv_heads", "head_size", "dtype", "shapes", "dtypes")
    return {"kind": type(spec).__name__, **{name: getattr(spec, name) for name in names if hasattr(spec, name)}}
