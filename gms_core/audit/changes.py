"""What it means that bytes differ: the tensors that they belong to, and where in the arena that is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from gms_core.audit.places import Places, Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes side by side that differ, as far as chunks tell.

    Attributes:
        offset: From the arena's base.
        size: Bytes.
    """

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes that the same tensors have, and that differ from what they were.

    Attributes:
        tensors: That have all of these bytes: several where they are views of one another, none where the bytes belong to none.
        first: The first part that differs.
        last: The last one.
        parts: How many there are.
        size: Bytes of all parts.
    """

    tensors: tuple[Tensor, ...]
    first: Part
    last: Part
    parts: int
    size: int

    def joined(self, part: Part) -> Change:
        """The same with one more part, which is behind all others."""
        size = self.size + part.size
        if self.last.end != part.offset:
            return Change(self.tensors, self.first, part, self.parts + 1, size)
        last = Part(self.last.offset, part.end - self.last.offset)
        return Change(self.tensors, last if self.parts == 1 else self.first, last, self.parts, size)


def changes(ranges: Iterable[tuple[int, int]], places: Places) -> list[Change]:
    """What it means that ranges of bytes differ.

    Args:
        ranges: Offset and end of each, in any order. None overlaps another.
        places: Whose they are.

    Returns:
        In the order of their first parts.
    """
    found: dict[tuple[Tensor, ...], Change] = {}
    for start, end in sorted(ranges):
        for one, following in itertools.pairwise((start, *places.borders(start, end), end)):
            part, tensors = Part(one, following - one), places.at(one, following)
            change = found.get(tensors)
            found[tensors] = change.joined(part) if change else Change(tensors, part, part, 1, part.size)
    return list(found.values())
