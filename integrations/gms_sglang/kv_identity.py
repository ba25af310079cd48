"""What KV memory is laid out for: only engines that agree in all of it can stand in for one another."""

from __future__ import annotations

from collections.abc import Mapping

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.kv.plan import FORMAT
from gms_core.layout import Identity

_OF_THE_WEIGHTS = frozenset({"content", "load"})
"""Fields of the weights' identity that say nothing of the KV memory. The pool of the weights sees to it that engines have the same ones."""


def kv_identity(weights: Identity, page_size: int, options: GmsConfig, failover: FailoverConfig) -> Identity:
    """The identity of the KV memory of this rank.

    Args:
        weights: Of the weights, from before they were loaded, which changes the configuration.
        page_size: Tokens.
        options: The engine's block.
        failover: How it fails over.
    """
    kept: Mapping[str, str] = {name: value for name, value in weights.fields.items() if name not in _OF_THE_WEIGHTS}
    return Identity(
        {
            **kept,
            "kv_page_size": str(page_size),
            "kv_plan": FORMAT,
            "weights": options.tag,
            "lock": failover.lock,  # engines of another lock would wait for memory that nobody is going to leave to them
        }
    )
