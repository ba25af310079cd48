"""A published pool as a pure state machine: who writes, who reads which generation, who waits for what. `Generations` says what is kept, and by what.

No I/O: each call returns the effects that the server has to carry out, in order. A call that raises has changed nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import msgspec

from gms_core.errors import AcquireTimeout, GenerationConflict, GmsError, IdentityMismatch, InvalidArgument, LeaseConflict
from gms_core.layout import Allocation, Identity, Layout, layout_digest
from gms_core.protocol.messages import Mode
from gms_core.server.draft import Draft
from gms_core.server.effects import Free, Refuse, SessionId, Wait
from gms_core.server.generations import Generations
from gms_core.server.grants import Effect, GrantRead, GrantWrite, News, Waiter
from gms_core.server.records import DraftRecord, PublishedRecord, RollbackRecord


class PublishedPool:
    """The state of one published pool.

    Attributes:
        generations: The layouts that are there, and what keeps them.
        draft: What the writer builds, if there is one.
        queue: Unanswered requests in order of arrival.
        watchers: The generation after which each waiting session wants to be told of the next one.
        rollbacks: The last rollback that each session has asked for, so that it can be told the same once more.
    """

    def __init__(self, name: str, last: int = 0) -> None:
        self.name = name
        self.generations = Generations(name, last)
        self._first = last
        self.draft: Draft | None = None
        self.queue: list[Waiter] = []
        self.watchers: dict[SessionId, int] = {}
        self.rollbacks: dict[SessionId, RollbackRecord] = {}

    @property
    def committed(self) -> Layout | None:
        """The layout that new readers get."""
        return self.generations.committed

    @property
    def readers(self) -> Mapping[SessionId, int]:
        """The generation that each reading session has."""
        return self.generations.readers

    def acquire(
        self,
        session: SessionId,
        mode: Mode,
        identity: Identity,
        replace: int | None = None,
        *,
        renumbers: bool = False,
        forbidden: Callable[[], GmsError | None] = lambda: None,
    ) -> list[Effect]:
        """Ask for a lease; the answer is among the effects, now or of a later call. ``forbidden`` says why the session may not write when it could.

        Raises:
            LeaseConflict: The session already has a lease on this pool, or waits for one.
        """
        if self.lease_of(session) or any(waiter.session == session for waiter in self.queue):
            raise LeaseConflict(f"this session already has, or waits for, a lease on pool {self.name!r}", hint="Release it first.")
        self.queue.append(Waiter(session, mode, identity, replace, renumbers, forbidden))
        return self._settle()

    def watch(self, session: SessionId, after: int) -> list[Effect]:
        """Ask to be told of a committed generation later than this one; the answer is among the effects, now or of a later call.

        Raises:
            LeaseConflict: The session has asked already.
        """
        if session in self.watchers:
            raise LeaseConflict(f"this session waits for a generation of pool {self.name!r} already")
        self.watchers[session] = after
        told = self._tell()
        return told if session not in self.watchers else [*told, Wait(session, f"generation {self.generations.last} is the last one")]

    def withdraw(self, session: SessionId, waited_s: float) -> list[Effect]:
        """Take a waiting request back because its time is over; none if it was answered meanwhile."""
        after = self.watchers.pop(session, None)
        if after is not None:
            return [Refuse(session, AcquireTimeout(f"no generation of pool {self.name!r} later than {after} was committed within {waited_s:g} s"))]
        waiting = next((waiter for waiter in self.queue if waiter.session == session), None)
        if waiting is None:
            return []
        self.queue.remove(waiting)
        message = f"no lease on pool {self.name!r} within {waited_s:g} s: {waiting.reason}"
        return [Refuse(session, AcquireTimeout(message)), *self._settle()]

    def writing(self, session: SessionId) -> Draft:
        """The draft that a session writes.

        Raises:
            LeaseConflict: It writes none.
        """
        if self.draft is None or self.draft.session != session:
            raise LeaseConflict(f"this session has no write lease on pool {self.name!r}")
        return self.draft

    def add(self, session: SessionId, allocations: Sequence[tuple[int, int]], batch: int = 0) -> None:
        """Add allocations (id, bytes) to the draft, in answer to the writer's request of that number.

        Raises:
            LeaseConflict: The session is not the writer.
        """
        self.writing(session).add(allocations, batch)

    def discard(self, session: SessionId, ids: Sequence[int]) -> list[Effect]:
        """Take allocations out of the draft.

        Raises:
            LeaseConflict: The session is not the writer, or one of them is not in its draft.
        """
        draft = self.writing(session)
        draft.check_owned(ids)
        for identifier in ids:
            del draft.sizes[identifier]
        return [Free(tuple(ids))] if ids else []

    def check_commit(self, session: SessionId, allocations: Sequence[Allocation]) -> Draft:
        """Raise unless these allocations can be committed now; nothing else can refuse a commit. Returns the draft.

        Raises:
            LeaseConflict: The session is not the writer, or an allocation is not of its draft.
            ManifestError: The allocations overlap or are out of order.
        """
        draft = self.writing(session)
        draft.check_commit(allocations)
        return draft

    def commit(
        self, session: SessionId, allocations: Sequence[Allocation], manifest: bytes, identity: Identity, *, pin: bool = False
    ) -> list[Effect]:
        """Publish the draft, and make the writer its first reader, in one step; with ``pin`` it is kept without readers too.

        Raises:
            LeaseConflict, ManifestError: As `check_commit` says.
        """
        draft = self.check_commit(session, allocations)
        kept = {allocation.id for allocation in allocations}
        dropped = tuple(identifier for identifier in draft.sizes if identifier not in kept)
        digest = layout_digest(identity, allocations, manifest)
        layout = Layout(draft.generation, identity, tuple(allocations), manifest, digest)
        effects: list[Effect] = [Free(dropped)] if dropped else []
        effects += self.generations.publish(layout)
        self.draft = None
        self.generations.readers[session] = layout.generation
        if pin:
            self.generations.pin(layout.generation)
        return [*effects, GrantRead(session, layout), *self._settle()]

    def rollback(self, session: SessionId, to: int, expected: int, number: int = 0) -> list[Effect]:
        """Publish the layout of an older generation once more, as a new generation with the same allocations.

        Args:
            session: Who wants it; `rollbacks` tells it the number.
            to: The generation whose layout it is.
            expected: The committed generation as the caller knows it; 0 if there is none.
            number: The session's own, of this request.

        Raises:
            GenerationConflict: Another one is committed.
            GenerationNotFound: There is no generation ``to`` any more.
            InvalidArgument: It is the committed one.
            LeaseConflict: The writer of the next generation could not take a later number than it was told.
        """
        current = self.generations.current
        if current != expected:
            raise GenerationConflict(f"generation {expected} of pool {self.name!r} was to be rolled back, but the committed one is {current}")
        older = self.generations.get(to)
        if to == current:
            raise InvalidArgument(f"generation {to} of pool {self.name!r} is the committed one already")
        draft = self.draft
        if draft is not None and not draft.renumbers:
            raise LeaseConflict(
                f"session {draft.session} is writing generation {draft.generation} of pool {self.name!r}, and its client is too old to be given "
                "another number"
            )
        layout = msgspec.structs.replace(older, generation=self.generations.last + 1)
        effects: list[Effect] = [*self.generations.publish(layout, to)]
        if draft is not None:
            draft.generation = layout.generation + 1
        self.rollbacks[session] = RollbackRecord(session, to, expected, layout.generation, number)
        return [*effects, *self._settle()]

    def pin(self, generation: int) -> list[Effect]:
        """Keep a generation without readers; raises what `Generations.pin` does."""
        self.generations.pin(generation)
        return self._settle()

    def unpin(self, generation: int) -> list[Effect]:
        """Keep a generation no more than any other; raises what `Generations.unpin` does."""
        return [*self.generations.unpin(generation), *self._settle()]

    def drop(self, generation: int) -> list[Effect]:
        """Free a generation that nobody reads and that is not pinned, the committed one too; raises what `Generations.drop` does."""
        return [*self.generations.drop(generation), *self._settle()]

    def begin_move(self, session: SessionId, identity: Identity, generation: int) -> GrantRead:
        """Let a reader have the committed generation beside its own, until it says which one it keeps.

        Args:
            session: It reads an older one, or the same.
            identity: What it expects.
            generation: The one that it means; 0 for whichever is committed.

        Raises:
            LeaseConflict: It reads nothing, or is moving already.
            GenerationConflict: Another one is committed, or none.
            IdentityMismatch: It is something else.
        """
        committed = self.committed
        if committed is not None and generation not in (0, committed.generation):
            raise GenerationConflict(f"generation {generation} of pool {self.name!r} is not the committed one any more: {committed.generation} is")
        if committed is not None and (differences := identity.differences(committed.identity)):
            raise self._mismatch(committed, differences)
        return GrantRead(session, self.generations.begin_move(session))

    def end_move(self, session: SessionId, kept: int) -> list[Effect]:
        """A reader that had two generations keeps this one alone; raises what `Generations.end_move` does."""
        return [*self.generations.end_move(session, kept), *self._settle()]

    def release(self, session: SessionId) -> list[Effect]:
        """End whatever the session has here: its lease with the draft, or its place in the queue."""
        self.queue = [waiter for waiter in self.queue if waiter.session != session]
        self.watchers.pop(session, None)
        self.rollbacks.pop(session, None)
        effects: list[Effect] = []
        if self.draft is not None and self.draft.session == session:
            if self.draft.sizes:
                effects.append(Free(tuple(self.draft.sizes)))
            self.draft = None
        return [*effects, *self.generations.leave(session), *self._settle()]

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
        return _sizes(self.generations.get(self.readers[session]))

    def exportable_to(self, session: SessionId) -> dict[int, int]:
        """The same, with those of the generation that the session is moving to.

        Raises:
            LeaseConflict: It has no lease.
        """
        moving = self.generations.moving.get(session)
        return {**self.allocations_of(session), **(_sizes(self.generations.get(moving)) if moving is not None else {})}

    def granted(self, session: SessionId) -> GrantWrite | GrantRead | None:
        """The grant that the session has, as it was told once."""
        if self.draft is not None and self.draft.session == session:
            return GrantWrite(session, self.draft.generation)
        return GrantRead(session, self.generations.get(self.readers[session])) if session in self.readers else None

    def record(self) -> PublishedRecord:
        """What the next server has to know, apart from layouts and readers."""
        draft, generations = self.draft, self.generations
        return PublishedRecord(
            generations.last,
            generations.current,
            tuple(sorted(generations.retired)),
            draft.record if draft is not None else None,
            tuple(sorted(generations.pins)),
            tuple(self.rollbacks.values()),
            dict(generations.origins),
        )

    @classmethod
    def of(cls, name: str, record: PublishedRecord, layouts: Mapping[int, Layout]) -> Self:
        """The pool of a record. What has no layout is left out; the last generation's number is kept."""
        pool = cls(name)
        pool.generations.last = record.generation
        pool.generations.restore(record.committed, record.retired, record.pinned, record.origins, layouts)
        pool.rollbacks = {rollback.session: rollback for rollback in record.rollbacks}
        return pool

    def resume_draft(self, draft: DraftRecord) -> None:
        """The draft of a session that may come back."""
        self.draft = Draft.of(draft)

    def resume_reader(self, session: SessionId, generation: int, moving: int = 0) -> None:
        """The read lease of a session that may come back, and the generation that it was moving to. What is not there is left out."""
        for had, one in ((self.generations.readers, generation), (self.generations.moving, moving)):
            if self.generations.find(one) is not None:
                had[session] = one

    def drop_unread(self) -> list[Effect]:
        """Free older generations that nothing keeps, once all readers are known."""
        return [*self.generations.collect()]

    @property
    def idle(self) -> bool:
        """Whether the pool was never anything: nothing is lost when it is forgotten."""
        return self.empty and self.generations.last == self._first

    @property
    def empty(self) -> bool:
        """Whether the pool holds nothing and nobody; it may still know its last generation."""
        return self.committed is None and not (self.generations.retired or self.draft or self.queue or self.watchers or self.readers)

    def _settle(self) -> list[Effect]:
        """Answer every request that can be answered now, in order of arrival. Readers never look at the queue, so no waiting writer blocks one."""
        effects: list[Effect] = []
        waiting: list[Waiter] = []
        for waiter in self.queue:
            decision = self._decide(waiter)
            if isinstance(decision, str):
                if decision != waiter.reason:
                    effects.append(Wait(waiter.session, decision))
                waiting.append(dataclasses.replace(waiter, reason=decision))
            else:
                effects += decision
        self.queue = waiting
        return [*effects, *self._tell()]

    def _tell(self) -> list[Effect]:
        """Answer every session that waits for a generation which is committed now."""
        committed = self.committed
        if committed is None:
            return []
        told = [session for session, after in self.watchers.items() if committed.generation > after]
        for session in told:
            del self.watchers[session]
        return [News(session, committed) for session in told]

    def _decide(self, waiter: Waiter) -> list[Effect] | str:
        """Effects that answer the request, or the reason why it has to wait."""
        if waiter.mode == "rw":
            return self._decide_write(waiter)
        committed = self.committed
        differences = waiter.identity.differences(committed.identity) if committed else {}
        if committed and not differences:
            self.generations.readers[waiter.session] = committed.generation
            return [GrantRead(waiter.session, committed)]
        if self.draft is not None:
            return f"session {self.draft.session} is writing generation {self.draft.generation}"
        if committed:
            return [Refuse(waiter.session, self._mismatch(committed, differences))]
        if waiter.mode == "auto":
            forbidden = waiter.forbidden()
            return self._start_draft(waiter) if forbidden is None else f"nothing is published, and {forbidden.message}"
        return "nothing is published yet and nobody is writing"

    def _decide_write(self, waiter: Waiter) -> list[Effect] | str:
        current = self.generations.current
        if waiter.replace not in (None, current):  # also while one is written: what gets that number need not be what the caller has in mind
            message = f"generation {waiter.replace} of pool {self.name!r} was to be replaced, but the committed one is {current}"
            return [Refuse(waiter.session, GenerationConflict(message))]
        if self.draft is not None:
            return f"session {self.draft.session} is writing generation {self.draft.generation}"
        if (forbidden := waiter.forbidden()) is not None:
            return [Refuse(waiter.session, forbidden)]
        if waiter.replace is None:
            return self._start_draft(waiter)
        if holders := self.generations.readers_of(current):
            return f"generation {current} is still read by sessions {', '.join(map(str, holders))}"
        if current in self.generations.pins:
            return f"generation {current} is pinned"
        return [*self.generations.retire(), *self._start_draft(waiter)]

    def _start_draft(self, waiter: Waiter) -> list[Effect]:
        self.draft = Draft(waiter.session, self.generations.last + 1, waiter.renumbers)
        return [GrantWrite(waiter.session, self.draft.generation)]

    def _mismatch(self, committed: Layout, differences: dict[str, str]) -> IdentityMismatch:
        listing = "; ".join(f"{name}: {pair}" for name, pair in differences.items())
        return IdentityMismatch(
            f"pool {self.name!r} holds generation {committed.generation} of something else: {listing} (expected != published)",
            hint="Use another tag for this model, or mode rw to publish a new generation beside it.",
            details=differences,
        )


def _sizes(layout: Layout) -> dict[int, int]:
    return {allocation.id: allocation.size for allocation in layout.allocations}
