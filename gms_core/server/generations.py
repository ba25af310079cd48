"""Which layouts of a published pool are there, and what keeps each: that it is the committed one, a reader, or a pin. Pure, as the pool is.

Several generations can have the same allocations (a rollback publishes an older layout once more): memory is freed when the last of them goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from gms_core.errors import GenerationConflict, GenerationNotFound, LeaseConflict
from gms_core.layout import Layout
from gms_core.server.effects import Free, SessionId


class Generations:
    """The layouts of one pool. A call that raises has changed nothing.

    Attributes:
        pool: Its name, for messages.
        committed: The layout that new readers get.
        retired: Older layouts by generation, each kept by a reader or a pin.
        readers: The generation that each reading session has.
        moving: The generation that a reading session is about to move to; it has both until it says which one it keeps.
        pins: Generations that are kept without readers.
        origins: Of each one that a rollback has made, the generation whose layout it has, which may be there no more.
        last: Number of the last one.
    """

    def __init__(self, pool: str, last: int = 0) -> None:
        self.pool = pool
        self.committed: Layout | None = None
        self.retired: dict[int, Layout] = {}
        self.readers: dict[SessionId, int] = {}
        self.moving: dict[SessionId, int] = {}
        self.pins: set[int] = set()
        self.origins: dict[int, int] = {}
        self.last = last

    @property
    def current(self) -> int:
        """The committed generation; 0 if there is none."""
        return self.committed.generation if self.committed is not None else 0

    def restore(self, committed: int, retired: Sequence[int], pins: Iterable[int], origins: Mapping[int, int], layouts: Mapping[int, Layout]) -> None:
        """Take over what a record says, with the layouts by the generations that they come from. What has no layout is left out."""
        found = {generation: layouts.get(origins.get(generation, generation)) for generation in (committed, *retired)}
        there = {generation: msgspec.structs.replace(one, generation=generation) for generation, one in found.items() if one is not None}
        self.committed = there.pop(committed, None)
        self.retired = there
        self.pins = {generation for generation in pins if self.find(generation) is not None}
        self.origins = {generation: origin for generation, origin in origins.items() if self.find(generation) is not None}

    def origin(self, generation: int) -> int:
        """The generation whose layout one has: generations with the same origin differ in nothing but their numbers."""
        return self.origins.get(generation, generation)

    def find(self, generation: int) -> Layout | None:
        """The layout of a generation that is committed or kept."""
        if self.committed is not None and self.committed.generation == generation:
            return self.committed
        return self.retired.get(generation)

    def get(self, generation: int) -> Layout:
        """The layout of a generation.

        Raises:
            GenerationNotFound: It is not there, or no more.
        """
        layout = self.find(generation)
        if layout is None:
            there = ", ".join(map(str, sorted(self.all()))) or "none"
            raise GenerationNotFound(f"pool {self.pool!r} has no generation {generation}", hint=f"It has: {there}.")
        return layout

    def readers_by_generation(self) -> dict[int, list[SessionId]]:
        """Sessions that read each generation, or are about to."""
        found: dict[int, set[SessionId]] = {}
        for had in (self.readers, self.moving):
            for session, generation in had.items():
                found.setdefault(generation, set()).add(session)
        return {generation: sorted(sessions) for generation, sessions in found.items()}

    def readers_of(self, generation: int) -> list[SessionId]:
        """Sessions that read a generation, or are about to."""
        return self.readers_by_generation().get(generation, [])

    def publish(self, layout: Layout, to: int | None = None) -> list[Free]:
        """Make a layout the committed one. The one before stays for whatever keeps it.

        Args:
            layout: With its number.
            to: The generation whose layout it is, if it is rolled back to.
        """
        self.last = layout.generation
        if to is not None:
            self.origins[layout.generation] = self.origin(to)
        before, self.committed = self.committed, layout
        if before is not None:
            self.retired[before.generation] = before
        return self.collect()

    def retire(self) -> list[Free]:
        """From now on nothing is committed."""
        before, self.committed = self.committed, None
        if before is not None:
            self.retired[before.generation] = before
        return self.collect()

    def leave(self, session: SessionId) -> list[Free]:
        """A session reads nothing any more."""
        left = {had.pop(session, 0) for had in (self.readers, self.moving)}
        return self.collect() if left & self.retired.keys() else []

    def pin(self, generation: int) -> None:
        """Keep a generation without readers.

        Raises:
            GenerationNotFound: It is not there.
        """
        self.pins.add(self.get(generation).generation)

    def unpin(self, generation: int) -> list[Free]:
        """Keep it no more than any other.

        Raises:
            GenerationNotFound: It is not there.
        """
        self.get(generation)
        self.pins.discard(generation)
        return self.collect()

    def drop(self, generation: int) -> list[Free]:
        """Free a generation that nothing keeps but that it is the committed one.

        Raises:
            GenerationNotFound: It is not there.
            LeaseConflict: Somebody reads it, or it is pinned.
        """
        self.get(generation)
        if readers := self.readers_of(generation):
            sessions = ", ".join(map(str, readers))
            raise LeaseConflict(
                f"generation {generation} of pool {self.pool!r} is read by sessions {sessions}",
                hint="gms status shows who they are; they have to release it, or to move to another generation.",
                details={"sessions": sessions},
            )
        if generation in self.pins:
            raise LeaseConflict(f"generation {generation} of pool {self.pool!r} is pinned", hint=f"gms pool unpin {self.pool} {generation}")
        return self.retire()  # it is the committed one: no other is there without a reader or a pin

    def begin_move(self, session: SessionId) -> Layout:
        """Let a reader have the committed generation beside its own.

        Raises:
            LeaseConflict: It reads nothing, or is moving already.
            GenerationConflict: Nothing is committed.
        """
        if session not in self.readers:
            raise LeaseConflict(f"this session reads nothing of pool {self.pool!r}")
        if session in self.moving:
            raise LeaseConflict(f"this session is moving to generation {self.moving[session]} of pool {self.pool!r} already")
        if self.committed is None:
            raise GenerationConflict(f"no generation of pool {self.pool!r} is committed")
        if self.committed.generation != self.readers[session]:
            self.moving[session] = self.committed.generation
        return self.committed

    def end_move(self, session: SessionId, kept: int) -> list[Free]:
        """A reader that had two generations keeps this one alone. If it has only this one already, nothing is to be done.

        Raises:
            LeaseConflict: It has no such generation.
        """
        had = {self.readers.get(session), self.moving.get(session)}
        if kept not in had:
            raise LeaseConflict(f"this session does not read generation {kept} of pool {self.pool!r}")
        self.readers[session] = kept
        self.moving.pop(session, None)
        return self.collect() if had & self.retired.keys() else []

    def collect(self) -> list[Free]:
        """Free the retired generations that nothing keeps, but no allocation that another one has too."""
        gone = [self.retired.pop(generation) for generation in sorted(self.retired.keys() - self.kept)]
        if not gone:
            return []
        for layout in gone:
            self.origins.pop(layout.generation, None)
        left = {allocation.id for layout in self.all().values() for allocation in layout.allocations}
        ids = dict.fromkeys(allocation.id for layout in gone for allocation in layout.allocations if allocation.id not in left)
        return [Free(tuple(ids))] if ids else []

    @property
    def kept(self) -> set[int]:
        """Generations that stay when they are not the committed one."""
        return {*self.readers.values(), *self.moving.values(), *self.pins}

    def all(self) -> dict[int, Layout]:
        """Every layout that is there, by generation."""
        return self.retired | ({self.committed.generation: self.committed} if self.committed is not None else {})

    @property
    def retired_bytes(self) -> int:
        """Bytes of what only retired generations have, each allocation once."""
        shared = {allocation.id for allocation in self.committed.allocations} if self.committed is not None else set()
        sizes = {allocation.id: allocation.size for layout in self.retired.values() for allocation in layout.allocations}
        return sum(size for identifier, size in sizes.items() if identifier not in shared)
