"""Where an image's bytes lie in files, and in which order they are moved. Pure: nothing is opened here."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gms_core.errors import InvalidArgument
from gms_core.snapshot.manifest import BLOCK_BYTES, Shard, Stripe

STRIPE_BYTES = 64 * 2**20
"""Bytes that lie together in one root: one allocation, however large, uses every disk."""
SHARD_BYTES = 4 * 2**30
"""Bytes of a file, at most."""


class WeightedRoot(NamedTuple):
    """A root that an image is laid over.

    Attributes:
        root: Its ``root_id``.
        weight: How much of the image it gets, in proportion to the others; such as its measured speed.
    """

    root: str
    weight: float = 1.0


class Piece(NamedTuple):
    """What is moved, and checked, at once: a block of an image.

    Attributes:
        block: Its number.
        offset: Bytes from the image's begin.
        size: Bytes.
        shard: Index of the shard that it lies in.
        position: Bytes from the shard's begin.
    """

    block: int
    offset: int
    size: int
    shard: int
    position: int


def check_sizes(stripe_bytes: int, shard_bytes: int) -> None:
    """Raise `InvalidArgument` for sizes that no image can be laid out with."""
    if stripe_bytes <= 0 or stripe_bytes % BLOCK_BYTES or shard_bytes <= 0 or shard_bytes % stripe_bytes:
        raise InvalidArgument(f"stripes of {stripe_bytes} and shards of {shard_bytes} bytes are no multiples of {BLOCK_BYTES} and of each other")


def lay_out(
    size: int, folder: str, places: Sequence[WeightedRoot], *, stripe_bytes: int = STRIPE_BYTES, shard_bytes: int = SHARD_BYTES
) -> tuple[tuple[Shard, ...], tuple[Stripe, ...]]:
    """Lay an image over roots, stripe by stripe, so that at any point each root has got its share as closely as stripes allow.

    Args:
        size: Bytes of the image, a multiple of `PAGE_BYTES`.
        folder: For its shards, relative to the snapshot's folder.
        places: The roots.
        stripe_bytes: A multiple of `BLOCK_BYTES`.
        shard_bytes: Bytes of a shard, at most; a multiple of ``stripe_bytes``.

    Raises:
        InvalidArgument: There is no root, a weight is not positive, or a size is no such multiple.
    """
    if not places or any(place.weight <= 0 for place in places):
        raise InvalidArgument("a snapshot needs a root, and each has a positive weight")
    check_sizes(stripe_bytes, shard_bytes)
    total = sum(place.weight for place in places)
    credit = [0.0] * len(places)
    shards: list[Shard] = []
    stripes: list[Stripe] = []
    current: list[int | None] = [None] * len(places)
    for offset in range(0, size, stripe_bytes):
        credit = [have + place.weight for have, place in zip(credit, places, strict=True)]
        chosen = max(range(len(places)), key=credit.__getitem__)
        credit[chosen] -= total
        length, shard = min(stripe_bytes, size - offset), current[chosen]
        if shard is None or shards[shard].size + length > shard_bytes:
            shard = current[chosen] = len(shards)
            shards.append(Shard(places[chosen].root, f"{folder}/{shard:05d}.shard", 0))
        stripes.append(Stripe(offset, length, shard, shards[shard].size))
        shards[shard] = Shard(shards[shard].root, shards[shard].path, shards[shard].size + length)
    return tuple(shards), tuple(stripes)


def pieces(stripes: Sequence[Stripe], block_bytes: int = BLOCK_BYTES) -> Iterator[Piece]:
    """The blocks of an image in its order."""
    for stripe in stripes:
        for inside in range(0, stripe.size, block_bytes):
            offset = stripe.offset + inside
            yield Piece(offset // block_bytes, offset, min(block_bytes, stripe.size - inside), stripe.shard, stripe.position + inside)


class Extents:
    """Where an image's parts lie in an arena. Made once for a transfer, since an image may have thousands of allocations and blocks.

    Args:
        allocations: Offset in the arena, and bytes, of each, in the order of the image.
    """

    def __init__(self, allocations: Iterable[tuple[int, int]]) -> None:
        self._begins: list[int] = []
        self._places: list[int] = []
        end, last = 0, -1
        for place, length in allocations:
            if place != last:
                self._begins.append(end)
                self._places.append(place)
            end, last = end + length, place + length
        self._size = end

    def ranges(self, offset: int, size: int) -> Sequence[tuple[int, int, int]]:
        """Where a part of the image lies in the arena: offset in the arena, offset in the part, and bytes, of each contiguous range.

        Raises:
            InvalidArgument: The image does not have this part.
        """
        last = offset + size
        if offset < 0 or size < 0 or last > self._size:
            raise InvalidArgument(f"{size} bytes at {offset} are not within the {self._size} bytes of the image")
        found, first, index = [], offset, bisect_right(self._begins, offset)
        while first < last:
            end = self._begins[index] if index < len(self._begins) else self._size
            length = min(last, end) - first
            found.append((self._places[index - 1] + first - self._begins[index - 1], first - offset, length))
            first, index = first + length, index + 1
        return found
