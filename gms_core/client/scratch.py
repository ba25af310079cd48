"""How a range of addresses is covered with little memory, mapped again and again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gms_core.client.arena import round_up
from gms_core.errors import InvalidArgument

MOST_ALIASES = 4096
"""Mappings of one scratch: each costs tens of microseconds to make and to grant, whatever its size."""


class ScratchPiece(NamedTuple):
    """One mapping of a scratch.

    Attributes:
        offset: Bytes from the base.
        size: Bytes.
        allocation: Which allocation lies there, counted from 0. All pieces with the same number have the same size.
    """

    offset: int
    size: int
    allocation: int


def scratch_layout(size: int, granularity: int, alias_bytes: int, cuts: Sequence[int] = ()) -> list[ScratchPiece]:
    """Cover a range with as little memory, mapped again and again, as a reasonable number of mappings allows.

    Memory is mapped whole, so what is left at the end of the range, or before a cut, is an allocation of its own; equal ends share one.

    Args:
        size: Bytes of the range, a multiple of the granularity.
        granularity: Bytes; of all offsets and sizes.
        alias_bytes: Bytes of the one allocation that lies beneath most of the range. It is rounded up, and made larger where the range would
            need more than `MOST_ALIASES` mappings.
        cuts: Offsets at which a piece has to end, multiples of the granularity.

    Returns:
        The pieces, in order and side by side.

    Raises:
        InvalidArgument: A size or a cut is out of range, or no multiple of the granularity.
    """
    if size <= 0 or size % granularity or alias_bytes <= 0:
        raise InvalidArgument(f"no scratch of {alias_bytes} bytes can lie beneath {size} bytes with a granularity of {granularity}")
    if wrong := [cut for cut in cuts if cut % granularity or not 0 <= cut <= size]:
        raise InvalidArgument(f"{wrong[0]} is no place to cut {size} bytes with a granularity of {granularity}")
    alias = min(size, round_up(max(alias_bytes, -(-size // MOST_ALIASES)), granularity))
    numbers: dict[int, int] = {}
    pieces: list[ScratchPiece] = []
    start = 0
    for end in sorted({*cuts, size} - {0}):
        while start < end:
            piece = min(alias, end - start)
            pieces.append(ScratchPiece(start, piece, numbers.setdefault(piece, len(numbers))))
            start += piece
    return pieces
