"""The plan of a rank's KV memory: what the first engine has measured and laid out, and every later one takes over unchanged. Pure."""

from __future__ import annotations

import secrets
from typing import Self

import msgspec

from gms_core.errors import IdentityMismatch, ProtocolError

FORMAT = "2"
"""Of the encoded plan. It is a part of the identity of the memory, so that engines of different formats never meet in one pool."""

_MISMATCH_HINT = "Start all engines that stand in for one another with the same options, or give this one another kv_tag."


class KvPlan(msgspec.Struct, frozen=True):
    """What an engine that stands in for another has to have in common with it.

    Attributes:
        budgets: Bytes that each rank's engine is told of in place of a measurement: the cache takes whole blocks of them. A rank whose server has
            forgotten its plan makes it anew of what the plans of the others say here.
        num_blocks: What the engine makes of it; the smallest number over all ranks.
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
    def new(cls, budgets: tuple[int, ...], num_blocks: int, buffers: tuple[int, ...], layout: str, bridge_blocks: int = 0) -> Self:
        """A plan for memory that is made of it now, with a mark that no other memory has."""
        return cls(budgets, num_blocks, buffers, layout, secrets.token_hex(16), bridge_blocks)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` has written.

        Raises:
            ProtocolError: It is no plan.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the pool's plan is not one of KV memory: {error}") from error

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


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"{sum(value)} bytes in {len(value)}"
    return str(value)
