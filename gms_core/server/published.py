"""A published pool as a pure state machine: who writes, who reads which generation, who waits for what.

No I/O: each call returns the effects that the server has to carry out, in order. A call that raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from gms_core.errors import AcquireTimeout, GenerationConflict, IdentityMismatch, LeaseConflict
from gms_core.layout import Allocation, Identity, Layout, check_allocations, layout_digest
from gms_core.protocol.messages import Mode
from gms_core.server.effects import Free, Refuse, SessionId, Wait
from gms_core.server.records import DraftRecord, PublishedRecord


@dataclass(frozen=True)
class GrantWrite:
    """The session is the writer of this generation to be."""

    session: SessionId
    generation: int


@dataclass(frozen=True)
class GrantRead:
    """The session reads this layout."""

    session: SessionId
    layout: Layout


Effect = GrantWrite | GrantRead | Wait | Refuse | Free


@dataclass(frozen=True)
class Waiter:
    """A request that is not answered yet."""

    session: SessionId
    mode: Mode
    identity: Identity
    replace: int | None
    reason: str = ""


@dataclass
class Draft:
    """The layout that the writer builds.

    Attributes:
        sizes: Bytes of each allocation.
        batch: The writer's number of its last request for allocations, and ``batch_ids`` what it got: asked again, it gets the same ones.
    """

    session: SessionId
    generation: int
    sizes: dict[int, int] = field(default_factory=dict)
    batch: int = 0
    batch_ids: tuple[int, ...] = ()


class PublishedPool:
    """The state of one published pool.

    Attributes:
        committed: The layout that new readers get.
        retired: Older layouts by generation, each kept by at least one reader.
        readers: The generation that each reading session has.
        draft: What the writer builds, if there is one.
        queue: Unanswered requests in order of arrival.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.committed: Layout | None = None
        self.retired: dict[int, Layout] = {}
        self.readers: dict[SessionId, int] = {}
        self.draft: Draft | None = None
        self.queue: list[Waiter] = []
        self._generation = 0

    def acquire(self, session: SessionId, mode: Mode, identity: Identity, replace: int | None = None) -> list[Effect]:
        """Ask for a lease; the answer is among the effects, now or of a later call.

        Raises:
            LeaseConflict: The session already has a lease on this pool, or waits for one.
        """
        if self.lease_of(session) or any(waiter.session == session for waiter in self.queue):
            raise LeaseConflict(f"this session already has, or waits for, a lease on pool {self.name!r}", hint="Release it first.")
        self.queue.append(Waiter(session, mode, identity, replace))
        return self._settle()

    def withdraw(self, session: SessionId, waited_s: float) -> list[Effect]:
        """Take a waiting request back because its time is over; none if it was answered meanwhile."""
        waiting = next((waiter for waiter in self.queue if waiter.session == session), None)
        if waiting is None:
            return []
        self.queue.remove(waiting)
        message = f"no lease on pool {self.name!r} within {waited_s:g} s: {waiting.reason}"
        return [Refuse(session, AcquireTimeout(message)), *self._settle()]

    def add(self, session: SessionId, allocations: Sequence[tuple[int, int]], batch: int = 0) -> None:
        """Add allocations (id, bytes) to the draft, in answer to the writer's request of that number.

        Raises:
            LeaseConflict: The session is not the writer.
        """
        draft = self._writing(session)
        draft.sizes.update(allocations)
        draft.batch, draft.batch_ids = batch, tuple(identifier for identifier, _ in allocations)

    def added(self, session: SessionId, batch: int) -> dict[int, int]:
        """What was added in answer to the writer's request of that number, if it was the last one; bytes by id.

        Raises:
            LeaseConflict: The session is not the writer.
        """
        draft = self._writing(session)
        return {identifier: draft.sizes[identifier] for identifier in draft.batch_ids if identifier in draft.sizes} if batch == draft.batch else {}

    def discard(self, session: SessionId, ids: Sequence[int]) -> list[Effect]:
        """Take allocations out of the draft.

        Raises:
            LeaseConflict: The session is not the writer, or one of them is not in its draft.
        """
        draft = self._writing(session)
        self._check_owned(draft, ids)
        for identifier in ids:
            del draft.sizes[identifier]
        return [Free(tuple(ids))] if ids else []

    def check_commit(self, session: SessionId, allocations: Sequence[Allocation]) -> Draft:
        """Raise unless these allocations can be committed now; nothing else can refuse a commit. Returns the draft.

        Raises:
            LeaseConflict: The session is not the writer, or an allocation is not of its draft.
            ManifestError: The allocations overlap or are out of order.
        """
        draft = self._writing(session)
        self._check_owned(draft, [allocation.id for allocation in allocations])
        if wrong := [allocation.id for allocation in allocations if draft.sizes[allocation.id] != allocation.size]:
            raise LeaseConflict(f"allocations {wrong} do not have the sizes that the commit says")
        check_allocations(allocations)
        return draft

    def commit(self, session: SessionId, allocations: Sequence[Allocation], manifest: bytes, identity: Identity) -> list[Effect]:
        """Publish the draft, and make the writer its first reader, in one step.

        Raises:
            LeaseConflict, ManifestError: As `check_commit` says.
        """
        draft = self.check_commit(session, allocations)
        kept = {allocation.id for allocation in allocations}
        dropped = tuple(identifier for identifier in draft.sizes if identifier not in kept)
        digest = layout_digest(identity, allocations, manifest)
        layout = Layout(draft.generation, identity, tuple(allocations), manifest, digest)
        effects: list[Effect] = [Free(dropped)] if dropped else []
        effects += self._retire()
        self.committed, self.draft, self._generation = layout, None, layout.generation
        self.readers[session] = layout.generation
        return [*effects, GrantRead(session, layout), *self._settle()]

    def release(self, session: SessionId) -> list[Effect]:
        """End whatever the session has here: its lease with the draft, or its place in the queue."""
        self.queue = [waiter for waiter in self.queue if waiter.session != session]
        effects: list[Effect] = []
        if self.draft is not None and self.draft.session == session:
            if self.draft.sizes:
                effects.append(Free(tuple(self.draft.sizes)))
            self.draft = None
        generation = self.readers.pop(session, None)
        if generation is not None and generation in self.retired and generation not in self.readers.values():
            effects.append(Free(_ids(self.retired.pop(generation))))
        return [*effects, *self._settle()]

    def lease_of(self, session: SessionId) -> str:
        """``write``, ``read`` or empty."""
        if self.draft is not None and self.draft.session == session:
            return "write"
        return "read" if session in self.readers else ""

    def allocations_of(self, session: SessionId) -> dict[int, int]:
        """Bytes by id, in arena order, of the allocations that the session's lease covers.

        Raises:
            LeaseConflict: It has no lease.
        """
        if self.draft is not None and self.draft.session == session:
            return dict(self.draft.sizes)
        if session not in self.readers:
            raise LeaseConflict(f"this session has no lease on pool {self.name!r}")
        return {allocation.id: allocation.size for allocation in self._layout(self.readers[session]).allocations}

    def granted(self, session: SessionId) -> GrantWrite | GrantRead | None:
        """The grant that the session has, as it was told once."""
        if self.draft is not None and self.draft.session == session:
            return GrantWrite(session, self.draft.generation)
        return GrantRead(session, self._layout(self.readers[session])) if session in self.readers else None

    def check_writer(self, session: SessionId) -> None:
        """Raise unless this session writes.

        Raises:
            LeaseConflict: It does not.
        """
        self._writing(session)

    def layout(self, generation: int) -> Layout | None:
        """The layout of a generation that is committed, or kept by its readers."""
        if self.committed is not None and self.committed.generation == generation:
            return self.committed
        return self.retired.get(generation)

    def record(self) -> PublishedRecord:
        """What the next server has to know, apart from layouts and readers."""
        draft = self.draft
        return PublishedRecord(
            self._generation,
            self.committed.generation if self.committed else 0,
            tuple(sorted(self.retired)),
            DraftRecord(draft.session, draft.generation, draft.sizes, draft.batch, draft.batch_ids) if draft else None,
        )

    @classmethod
    def of(cls, name: str, record: PublishedRecord, layouts: Mapping[int, Layout]) -> Self:
        """The pool of a record. What has no layout is left out; the last generation's number is kept."""
        pool = cls(name)
        pool._generation = record.generation
        pool.committed = layouts.get(record.committed)
        pool.retired = {generation: layouts[generation] for generation in record.retired if generation in layouts}
        return pool

    def resume_draft(self, draft: DraftRecord) -> None:
        """The draft of a session that may come back."""
        self.draft = Draft(draft.session, draft.generation, dict(draft.sizes), draft.batch, draft.batch_ids)

    def resume_reader(self, session: SessionId, generation: int) -> bool:
        """The read lease of a session that may come back; returns whether there is such a generation."""
        if self.layout(generation) is None:
            return False
        self.readers[session] = generation
        return True

    def drop_unread(self) -> list[Effect]:
        """Free older generations that nobody reads, once all readers are known."""
        unread = [generation for generation in self.retired if generation not in self.readers.values()]
        return [Free(_ids(self.retired.pop(generation))) for generation in unread]

    @property
    def idle(self) -> bool:
        """Whether the pool was never anything: nothing is lost when it is forgotten."""
        return self.empty and self._generation == 0

    @property
    def empty(self) -> bool:
        """Whether the pool holds nothing and nobody; it may still know its last generation."""
        return self.committed is None and self.draft is None and not self.queue and not self.readers

    def _layout(self, generation: int) -> Layout:
        if self.committed is not None and self.committed.generation == generation:
            return self.committed
        return self.retired[generation]

    def _writing(self, session: SessionId) -> Draft:
        if self.draft is None or self.draft.session != session:
            raise LeaseConflict(f"this session has no write lease on pool {self.name!r}")
        return self.draft

    def _check_owned(self, draft: Draft, ids: Sequence[int]) -> None:
        if len(set(ids)) != len(ids):
            raise LeaseConflict("an allocation is named twice")
        if strange := [identifier for identifier in ids if identifier not in draft.sizes]:
            raise LeaseConflict(f"allocations {strange} are not in the draft of pool {self.name!r}")

    def _retire(self) -> list[Effect]:
        """Make room for another committed layout: readers keep the old one, else it is freed."""
        old, self.committed = self.committed, None
        if old is None:
            return []
        if old.generation in self.readers.values():
            self.retired[old.generation] = old
            return []
        return [Free(_ids(old))]

    def _settle(self) -> list[Effect]:
        """Answer every request that can be answered now, in order of arrival. Readers never look at the queue, so no waiting writer blocks one."""
        effects: list[Effect] = []
        waiting: list[Waiter] = []
        for waiter in self.queue:
            decision = self._decide(waiter)
            if isinstance(decision, str):
                if decision != waiter.reason:
                    effects.append(Wait(waiter.session, decision))
                waiting.append(Waiter(waiter.session, waiter.mode, waiter.identity, waiter.replace, decision))
            else:
                effects += decision
        self.queue = waiting
        return effects

    def _decide(self, waiter: Waiter) -> list[Effect] | str:
        """Effects that answer the request, or the reason why it has to wait."""
        if waiter.mode == "rw":
            return self._decide_write(waiter)
        committed = self.committed
        differences = waiter.identity.differences(committed.identity) if committed else {}
        if committed and not differences:
            self.readers[waiter.session] = committed.generation
            return [GrantRead(waiter.session, committed)]
        if self.draft is not None:
            return f"session {self.draft.session} is writing generation {self.draft.generation}"
        if committed:
            return [Refuse(waiter.session, self._mismatch(committed, differences))]
        if waiter.mode == "auto":
            return self._start_draft(waiter.session)
        return "nothing is published yet and nobody is writing"

    def _decide_write(self, waiter: Waiter) -> list[Effect] | str:
        if self.draft is not None:
            return f"session {self.draft.session} is writing generation {self.draft.generation}"
        if waiter.replace is None:
            return self._start_draft(waiter.session)
        current = self.committed.generation if self.committed else 0
        if current != waiter.replace:
            message = f"generation {waiter.replace} of pool {self.name!r} was to be replaced, but the committed one is {current}"
            return [Refuse(waiter.session, GenerationConflict(message))]
        if holders := sorted(session for session, generation in self.readers.items() if generation == current):
            return f"generation {current} is still read by sessions {', '.join(map(str, holders))}"
        return [*self._retire(), *self._start_draft(waiter.session)]

    def _start_draft(self, session: SessionId) -> list[Effect]:
        self.draft = Draft(session, self._generation + 1)
        return [GrantWrite(session, self.draft.generation)]

    def _mismatch(self, committed: Layout, differences: dict[str, str]) -> IdentityMismatch:
        listing = "; ".join(f"{name}: {pair}" for name, pair in differences.items())
        return IdentityMismatch(
            f"pool {self.name!r} holds generation {committed.generation} of something else: {listing} (expected != published)",
            hint="Use another tag for this model, or mode rw to publish a new generation beside it.",
            details=differences,
        )


def _ids(layout: Layout) -> tuple[int, ...]:
    return tuple(allocation.id for allocation in layout.allocations)
