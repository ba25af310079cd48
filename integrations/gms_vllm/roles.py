"""The ranks of an engine that load together."""

from __future__ import annotations

from typing import Any


def all_ranks() -> Any:
    """The group of all ranks that compute together, if there are several; else None."""
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    return world if world.world_size > 1 else None
