"""What SGLang's KV cache says to the plan of the KV memory. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gms_core.errors import ConfigurationError, EngineUnsupported


class Values(NamedTuple):
    """A tensor of the KV cache.

    Attributes:
        shape: Its dimensions.
        strides: Elements from one to the next, by dimension.
        dtype: Of its elements.
        size: Bytes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    size: int


def layout_of(pool: Mapping[str, object], tensors: Iterable[Values]) -> str:
    """A digest of everything that decides what lies where.

    Args:
        pool: What the pool says of itself: its class, its page size, its layers.
        tensors: All of it, in order.
    """
    told = json.dumps([dict(pool), [list(tensor) for tensor in tensors]], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def budget_of(tensors: Iterable[Values], tokens: int, page_size: int) -> int:
    """The bytes of which SGLang makes a cache for so many tokens: without the first page, which it adds for what padding writes.

    Args:
        tensors: All of the cache.
        tokens: That requests can have in it.
        page_size: Tokens.

    Raises:
        EngineUnsupported: A tensor does not have room for that many.
    """
    slots = tokens + page_size
    total = sum(tensor.size for tensor in tensors)
    if not tokens or total % slots:
        raise EngineUnsupported(
            f"failover: {total} bytes of KV cache are no whole number of bytes for each of {slots} tokens", hint="Leave failover out for this engine."
        )
    return total // slots * tokens


def check_cap(cap: int | None, planned: int, page_size: int, pool: str) -> None:
    """Make sure that the user's cap of the KV cache lets an engine take a plan over.

    Args:
        cap: Tokens of ``--max-total-tokens``; None for none. SGLang takes whole pages of them.
        planned: Tokens of the plan.
        page_size: Tokens.
        pool: Name of the pool, for the message.

    Raises:
        ConfigurationError: It is less than was planned.
    """
    if cap is not None and cap // page_size * page_size < planned:
        raise ConfigurationError(
            f"--max-total-tokens {cap} is less than pool {pool!r} was planned with: {planned}",
            hint="Leave the option out: engines that stand in for one another have the first one's KV memory. Or give this one another kv_tag.",
        )
