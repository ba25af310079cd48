"""How memory is cut into chunks, each with a digest, so that a difference is found where it is and no copy of the memory is needed.

A chunk lies in one allocation, and either wholly or not at all in any tensor.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from gms_core.audit.places import Places
from gms_core.layout import Allocation

FINEST_BYTES = 4096
MOST_CHUNKS = 2**20
"""Of one layout, besides those that the borders of tensors add: their digests and borders take 16 MiB."""
READ_BYTES = 4 * 2**20
"""What is read at a time, at most."""
DIGEST_BYTES = 8


def chunk_bytes(size: int) -> int:
    """The longest that a chunk of so much memory is: as short as the number of chunks allows, and a power of two."""
    chunk = FINEST_BYTES
    while chunk < READ_BYTES and chunk * MOST_CHUNKS < size:
        chunk *= 2
    return chunk


@dataclass(frozen=True, slots=True)
class Stretch:
    """One allocation, cut.

    Attributes:
        edges: Offsets in the arena, rising: chunk ``k`` is from ``edges[k]`` to ``edges[k + 1]``.
        digests: Of the chunks, one after the other.
    """

    edges: array[int]
    digests: bytearray

    def known(self, first: int, last: int) -> bytes:
        """The digests of the chunks from one to before another."""
        return bytes(self.digests[first * DIGEST_BYTES : last * DIGEST_BYTES])

    def keep(self, first: int, digests: bytes) -> None:
        """Put digests in the place of those from a chunk on."""
        start = first * DIGEST_BYTES
        self.digests[start : start + len(digests)] = digests


@dataclass(frozen=True, slots=True)
class Block:
    """Chunks side by side that are read at once: those from ``first`` to before ``last``."""

    stretch: Stretch
    first: int
    last: int

    @property
    def start(self) -> int:
        """The offset of the first byte."""
        return self.stretch.edges[self.first]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stretch.edges[self.last] - self.start


def cut(allocations: Sequence[Allocation], places: Places, chunk: int) -> tuple[Stretch, ...]:
    """Cut allocations at the borders of tensors, and at all multiples of ``chunk``."""
    return tuple(_stretch(allocation.offset, allocation.offset + allocation.size, places, chunk) for allocation in allocations)


def _stretch(start: int, end: int, places: Places, chunk: int) -> Stretch:
    edges = array("Q", [start])
    for border in (*places.borders(start, end), end):
        edges.extend(range((edges[-1] // chunk + 1) * chunk, border, chunk))
        edges.append(border)
    return Stretch(edges, bytearray((len(edges) - 1) * DIGEST_BYTES))


def blocks(stretches: Sequence[Stretch], most_bytes: int = READ_BYTES) -> Iterator[Block]:
    """All chunks, in blocks of at most so many bytes, or of one chunk."""
    for stretch in stretches:
        first, count = 0, len(stretch.edges) - 1
        while first < count:
            last = max(first + 1, bisect.bisect_right(stretch.edges, stretch.edges[first] + most_bytes) - 1)
            yield Block(stretch, first, last)
            first = last


def digests_of(block: Block, data: bytes) -> bytes:
    """Digests of a block's chunks, of its bytes."""
    view, start = memoryview(data), block.start
    edges = block.stretch.edges[block.first : block.last + 1]
    return b"".join([xxhash.xxh3_64_digest(view[one - start : following - start]) for one, following in itertools.pairwise(edges)])


def differing(block: Block, before: bytes, after: bytes) -> list[tuple[int, int]]:
    """Where a block has changed: offset and end of chunks, with those side by side as one, whomever they belong to.

    Args:
        block: The chunks.
        before: Their digests as they were.
        after: As they are.
    """
    found: list[tuple[int, int]] = []
    if before == after:
        return found
    for place in range(0, len(after), DIGEST_BYTES):
        if before[place : place + DIGEST_BYTES] != after[place : place + DIGEST_BYTES]:
            chunk = block.first + place // DIGEST_BYTES
            start, end = block.stretch.edges[chunk], block.stretch.edges[chunk + 1]
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


def digest_of_all(stretches: Sequence[Stretch]) -> str:
    """A digest of all bytes; equal for equal bytes that are cut equally."""
    hasher = xxhash.xxh3_128()
    for stretch in stretches:
        hasher.update(stretch.digests)
    return f"xxh3:{hasher.hexdigest()}"
