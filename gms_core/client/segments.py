"""Allocations as they are mapped in an arena, and the exchange of some of them for others at the same addresses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gms_core.errors import GmsError
from gms_core.layout import Allocation
from gms_core.vmm.driver import Access, Address, Driver, Handle
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Segment:
    """One allocation in the arena."""

    allocation: Allocation
    handle: Handle

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.allocation.offset + self.allocation.size


def runs(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The contiguous ranges, as offsets, that segments in arena order cover."""
    found: list[tuple[int, int]] = []
    for segment in segments:
        if found and found[-1][1] == segment.allocation.offset:
            found[-1] = (found[-1][0], segment.end)
        else:
            found.append((segment.allocation.offset, segment.end))
    return found


def grant(driver: Driver, base: Address, segments: Sequence[Segment], access: Access) -> None:
    """Set the access of segments, one call for each contiguous run: the cost of the call is per call far more than per byte."""
    for start, end in runs(segments):
        driver.set_access(Address(base + start), end - start, access)


def unmap(driver: Driver, base: Address, segment: Segment) -> None:
    """Unmap one segment."""
    driver.unmap(Address(base + segment.allocation.offset), segment.allocation.size)


class Exchange:
    """Maps some segments of an arena in place of others, and knows at any time what is mapped, whatever the driver refuses.

    Args:
        driver: Of the arena.
        base: Of the arena.
        access: Of the arena.
        before: All its segments, which are mapped.
    """

    def __init__(self, driver: Driver, base: Address, access: Access, before: Iterable[Segment]) -> None:
        self._driver = driver
        self._base = base
        self._access = access
        self._before = frozenset(before)
        self._mapped = set(self._before)
        self._usable = set(self._before)

    @property
    def is_undone(self) -> bool:
        """Whether everything is as it was before."""
        return self._mapped == self._usable == self._before

    def carry_out(self, gone: Sequence[Segment], new: Sequence[Segment], undo: UndoStack) -> None:
        """Map ``new`` in place of ``gone``.

        Args:
            gone: Some of the segments from before.
            new: Others.
            undo: Gets the inverse of each step.
        """
        self._driver.synchronize()
        for segment in gone:
            self._unmap(segment)
            undo.push(self._put_back, segment)
        for segment in new:
            self._map(segment)
            undo.push(self._unmap, segment)
        grant(self._driver, self._base, new, self._access)

    def unmap_all(self) -> list[Segment]:
        """Unmap whatever is mapped: a part of a layout is of no use to anybody. Returns what stays mapped nevertheless."""
        for segment in list(self._mapped):
            try:
                self._unmap(segment)
            except GmsError as error:
                log.error("allocation %d stays mapped: %s", segment.allocation.id, error)
        return list(self._mapped)

    def _map(self, segment: Segment) -> None:
        self._driver.map(Address(self._base + segment.allocation.offset), segment.allocation.size, segment.handle)
        self._mapped.add(segment)

    def _unmap(self, segment: Segment) -> None:
        unmap(self._driver, self._base, segment)
        self._mapped.discard(segment)
        self._usable.discard(segment)

    def _put_back(self, segment: Segment) -> None:
        self._map(segment)
        grant(self._driver, self._base, [segment], self._access)
        self._usable.add(segment)
