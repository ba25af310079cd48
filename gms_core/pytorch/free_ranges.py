"""Which parts of an arena were given back and can be given out again. Pure."""

from __future__ import annotations

import bisect


class FreeRanges:
    """Ranges of offsets, none of which touches another."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(end - start for start, end in self._ranges)

    def add(self, offset: int, size: int) -> None:
        """Give a range back. What is free already stays free."""
        start, end = offset, offset + size
        kept = []
        for known in self._ranges:
            if known[1] < start or end < known[0]:
                kept.append(known)
            else:
                start, end = min(start, known[0]), max(end, known[1])
        bisect.insort(kept, (start, end))
        self._ranges = kept

    def take(self, size: int, alignment: int) -> int | None:
        """Take bytes from the smallest range that has room for them.

        Returns:
            Their offset, or None when no range is long enough.
        """
        best: tuple[int, int] | None = None
        for start, end in self._ranges:
            aligned = -(-start // alignment) * alignment
            if aligned + size <= end and (best is None or end - start < best[1] - best[0]):
                best = (start, end)
        if best is None:
            return None
        start, end = best
        aligned = -(-start // alignment) * alignment
        self._ranges.remove(best)
        for rest in ((start, aligned), (aligned + size, end)):
            if rest[0] < rest[1]:
                bisect.insort(self._ranges, rest)
        return aligned
