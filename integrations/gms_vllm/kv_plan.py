"""The plan of a rank's KV memory: what the first engine has measured and laid out, and every later one takes over unchanged. Pure."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from gms_core.errors import ConfigurationError, IdentityMismatch, ProtocolError
from gms_vllm.kv_buffers import raw_buffers

FORMAT = "2"
"""Of the encoded plan. It is a part of the identity of the memory, so that engines of different formats never meet in one pool."""

_MISMATCH_HINT = "Start all engines that stand in for one another with the same options, or give this one another kv_tag."


class KvPlan(msgspec.Struct, frozen=True):
    """What an engine that stands in for another has to have in common with it.

    Attributes:
        budgets: What each rank's vLLM is told as ``kv_cache_memory_bytes`` in place of a measurement: the cache takes whole blocks of it. A rank
            whose server has forgotten its plan makes it anew of what the plans of the others say here.
        num_blocks: What vLLM makes of it; the smallest number over all ranks.
        buffers: Bytes of each raw buffer, in the order in which they are made.
        layout: Digest of where layers and blocks lie in them.
        mark: Random text of this memory, which is in it once it was made zero.
        bridge_blocks: Blocks, from the first one on, that lie in the part which exists twice; 0 if there is none.
    """

    budgets: tuple[int, ...]
    num_blocks: int
    buffers: tuple[int, ...]
    layout: str
    mark: str
    bridge_blocks: int = 0

    @classmethod
    def of(cls, config: Any, budgets: tuple[int, ...], bridge_blocks: int = 0) -> Self:
        """The plan that a ``KVCacheConfig`` comes from, for memory that is made of it now."""
        return cls(budgets, config.num_blocks, raw_buffers(config), _layout(config), secrets.token_hex(16), bridge_blocks)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` has written.

        Raises:
            ProtocolError: It is no plan.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the pool's plan is not one of vLLM's KV memory: {error}") from error

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    def check_adopted(self, here: KvPlan, pool: str) -> None:
        """Make sure that this engine has become what was planned.

        Args:
            here: What it has become.
            pool: Name of the pool, for the message.

        Raises:
            IdentityMismatch: It differs; ``details`` says in what.
        """
        pairs = {name: (getattr(here, name), getattr(self, name)) for name in ("num_blocks", "buffers", "layout")}
        differing = {name: f"{_short(found)} != {_short(planned)}" for name, (found, planned) in pairs.items() if found != planned}
        if differing:
            listing = "; ".join(f"{name}: {pair}" for name, pair in differing.items())
            raise IdentityMismatch(
                f"this engine's KV cache is not the one that pool {pool!r} is for: {listing} (here != planned)",
                hint=_MISMATCH_HINT,
                details=differing,
            )


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


def _layout(config: Any) -> str:
    """A digest of everything but sizes. It leaves out what is made anew in each process, such as functions that a specification refers to."""
    tensors = [{name: value for name, value in sorted(vars(tensor).items()) if name != "size"} for tensor in config.kv_cache_tensors]
    groups = [[list(group.layer_names), _specification(group.kv_cache_spec)] for group in config.kv_cache_groups]
    told = json.dumps([tensors, groups, getattr(config, "kv_cache_layout", None)], default=str)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def _specification(spec: Any) -> Mapping[str, object]:
    names = ("block_size", "page_size_bytes", "num_kv_heads", "head_size", "dtype", "shapes", "dtypes")
    return {"kind": type(spec).__name__, **{name: getattr(spec, name) for name in names if hasattr(spec, name)}}


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"{sum(value)} bytes in {len(value)}"
    return str(value)
