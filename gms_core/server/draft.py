"""The layout that a writer builds. Pure, like the published pool that it is a part of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from gms_core.errors import LeaseConflict
from gms_core.layout import Allocation, check_allocations
from gms_core.server.effects import SessionId
from gms_core.server.records import DraftRecord


@dataclass
class Draft:
    """What is there of it. A call that raises has changed nothing.

    Attributes:
        generation: The number that its commit will carry; a rollback meanwhile makes it a later one, if the writer can take that.
        renumbers: Whether it can.
        sizes: Bytes of each allocation.
        batch: The writer's number of its last request for allocations, and ``batch_ids`` what it got: asked again, it gets the same ones.
    """

    session: SessionId
    generation: int
    renumbers: bool = False
    sizes: dict[int, int] = field(default_factory=dict)
    batch: int = 0
    batch_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, record: DraftRecord) -> Self:
        """The draft of a record."""
        return cls(record.session, record.generation, record.renumbers, dict(record.sizes), record.batch, record.batch_ids)

    @property
    def record(self) -> DraftRecord:
        """What the next server has to know of it."""
        return DraftRecord(self.session, self.generation, self.sizes, self.batch, self.batch_ids, self.renumbers)

    def add(self, allocations: Sequence[tuple[int, int]], batch: int) -> None:
        """Add allocations (id, bytes), in answer to the writer's request of that number."""
        self.sizes.update(allocations)
        self.batch, self.batch_ids = batch, tuple(identifier for identifier, _ in allocations)

    def added(self, batch: int) -> dict[int, int]:
        """What was added in answer to the writer's request of that number, if it was the last one; bytes by id."""
        return {identifier: self.sizes[identifier] for identifier in self.batch_ids if identifier in self.sizes} if batch == self.batch else {}

    def check_owned(self, ids: Sequence[int]) -> None:
        """Raise `LeaseConflict` unless all of these allocations are in it, each named once."""
        if len(set(ids)) != len(ids):
            raise LeaseConflict("an allocation is named twice")
        if strange := [identifier for identifier in ids if identifier not in self.sizes]:
            raise LeaseConflict(f"allocations {strange} are not in this draft")

    def check_commit(self, allocations: Sequence[Allocation]) -> None:
        """Raise `LeaseConflict` or `ManifestError` unless these allocations can be committed."""
        self.check_owned([allocation.id for allocation in allocations])
        if wrong := [allocation.id for allocation in allocations if self.sizes[allocation.id] != allocation.size]:
            raise LeaseConflict(f"allocations {wrong} do not have the sizes that the commit says")
        check_allocations(allocations)
