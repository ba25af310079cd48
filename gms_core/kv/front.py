"""Which part of the KV memory the first blocks lie in, and how memory is cut so that this part is there twice. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MOST_RANGES = 8192
"""Of one tensor: one that is cut into more pieces by its blocks is not what a bridge is for."""


class View(NamedTuple):
    """A tensor of the KV cache.

    Attributes:
        offset: Bytes from the base of the KV memory.
        shape: Its dimensions; one of them counts blocks.
        strides: Bytes from one element to the next, by dimension.
        itemsize: Bytes of an element.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


class Range(NamedTuple):
    """Bytes from the base of the KV memory; ``end`` is the first one behind."""

    start: int
    end: int


def front_of(views: Iterable[View], num_blocks: int, blocks: int, granularity: int) -> list[Range]:
    """Where all bytes of the first blocks of all tensors lie.

    Args:
        views: All tensors of the KV cache.
        num_blocks: Blocks that each of them has.
        blocks: How many of these, from the first one on.
        granularity: Bytes; ranges begin and end at its multiples, so others' bytes may lie in them too.

    Returns:
        Ranges, ascending and apart from one another; empty if it cannot be told of a tensor where its blocks lie.
    """
    found: list[Range] = []
    for view in views:
        ranges = _ranges(view, num_blocks, blocks)
        if ranges is None:
            return []
        found += [Range(start // granularity * granularity, -(-end // granularity) * granularity) for start, end in ranges]
    return merged(found)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes, in ranges that are ascending and apart from one another."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1].end:
            found[-1] = Range(found[-1].start, max(end, found[-1].end))
        else:
            found.append(Range(start, end))
    return found


def _ranges(view: View, num_blocks: int, blocks: int) -> list[Range] | None:
    """Where the first blocks of one tensor lie; None if that cannot be told."""
    place = _block_dimension(view.shape, num_blocks)
    if place is None or len(view.shape) < 2 or min(view.shape) < 1 or min(view.strides) < 0:
        return None
    stride = view.strides[place]
    rows = blocks * (view.shape[place] // num_blocks)
    others = [(size, step) for number, (size, step) in enumerate(zip(view.shape, view.strides, strict=True)) if number != place and size > 1]
    inner = [(size, step) for size, step in others if step < stride]
    outer = [(size, step) for size, step in others if step >= stride]
    block_bytes = sum((size - 1) * step for size, step in inner) + view.itemsize
    if block_bytes > stride or math.prod(size for size, _ in outer) > MOST_RANGES:
        return None
    starts = (view.offset + sum(steps) for steps in itertools.product(*([index * step for index in range(size)] for size, step in outer)))
    return [Range(start, start + (rows - 1) * stride + block_bytes) for start in starts]


def _block_dimension(shape: Sequence[int], num_blocks: int) -> int | None:
    """Which dimension counts blocks, or the parts that a kernel cuts each of them into; None if several could."""
    found = [number for number, size in enumerate(shape) if size and size % num_blocks == 0]
    return found[0] if len(found) == 1 else None


def size_of(ranges: Iterable[Range]) -> int:
    """Bytes of all of them together, which do not overlap."""
    return sum(end - start for start, end in ranges)


def covers(ranges: Iterable[Range], parts: Iterable[Range]) -> bool:
    """Whether each of some parts lies in one of the ranges."""
    whole = list(ranges)
    return all(any(one.start <= part.start and part.end <= one.end for one in whole) for part in parts)


class Cut(NamedTuple):
    """How memory is cut into allocations.

    Attributes:
        sizes: Of the allocations, side by side from offset 0.
        front: Which of them make up the front.
    """

    sizes: list[int]
    front: list[int]


def cut(size: int, slab: int, front: Sequence[Range] = ()) -> Cut:
    """Cut memory into allocations of at most a slab, none of which lies across a border of the front.

    Args:
        size: Bytes.
        slab: Bytes.
        front: As of `front_of`.
    """
    sizes: list[int] = []
    chosen: list[int] = []
    at = 0
    for start, end in (*front, Range(size, size)):
        sizes += _slabs(start - at, slab)
        pieces = _slabs(end - start, slab)
        chosen += range(len(sizes), len(sizes) + len(pieces))
        sizes += pieces
        at = end
    return Cut(sizes, chosen)


def _slabs(size: int, slab: int) -> list[int]:
    whole, rest = divmod(size, slab)
    return [slab] * whole + [rest] * (rest > 0)


def borders(front: Iterable[Range]) -> list[int]:
    """Where scratch must be cut, so that each range of the front can be replaced."""
    return sorted({offset for one in front for offset in one})
