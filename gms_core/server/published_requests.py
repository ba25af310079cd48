"""Carries out requests on published pools: leases, the memory of a draft, and its publication."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from gms_core.errors import InvalidArgument, LeaseConflict, PoolNotFound, ProtocolError, QuotaExceeded
from gms_core.events import Kind
from gms_core.layout import Layout
from gms_core.protocol.messages import Acquire, Allocate, Commit, Discard, Done, Export, ReadGranted, WriteGranted
from gms_core.server.accounts import Accounts
from gms_core.server.effects import Free, SessionId
from gms_core.server.exports import send_descriptors
from gms_core.server.grants import Effect, GrantRead, GrantWrite
from gms_core.server.journal import Values
from gms_core.server.limits import Limits, check_metadata, check_name, check_pins
from gms_core.server.memory import Memory
from gms_core.server.observer import Tell, tell_nobody
from gms_core.server.pool_changes import NEW, NOBODY, PublishedView, look_published, published_changes, same_published
from gms_core.server.published import PublishedPool
from gms_core.server.records import FORMATS, SessionRecord
from gms_core.server.rights import writing_forbidden
from gms_core.server.sessions import Session, check_wait
from gms_core.server.state import pool_values


class PublishedRequests:
    """The published pools of one server.

    Attributes:
        pools: By name.
        forgotten: The highest number of a generation of all pools that were forgotten: where a new one begins, so that no number comes twice.

    Args:
        sessions: All that are open.
        memory: The device's allocations.
        limits: Bounds on what clients may cost.
        accounts: Who has what, and may have more.
        free: Gives allocations up that were part of a pool.
        changed: Called when a pool may have changed, with the sessions whose leases on it may have.
        others: Names of the pools of the other class.
        tell: Is told of what happens.
    """

    def __init__(
        self,
        sessions: Mapping[SessionId, Session],
        memory: Memory,
        limits: Limits,
        accounts: Accounts,
        *,
        free: Callable[[Sequence[int]], None],
        changed: Callable[[str, Sequence[SessionId]], None],
        others: Callable[[], Collection[str]],
        tell: Tell = tell_nobody,
    ) -> None:
        self.pools: dict[str, PublishedPool] = {}
        self.forgotten = 0
        self._sessions = sessions
        self._memory = memory
        self._limits = limits
        self._accounts = accounts
        self._free, self._changed, self._others, self._tell = free, changed, others, tell
        self._seen: dict[str, PublishedView] = {}

    async def acquire(self, session: Session, request: Acquire, ended: asyncio.Event) -> None:
        """Grant a lease."""
        check_wait(request.timeout_s, self._limits.wait_s)
        check_metadata(self._limits, request.identity)
        pool = self.find(request.pool, create=True)
        granted = pool.granted(session.id) if session.repeats else None
        if granted is None:
            try:
                self._accounts.check_joins(pool.name, session.id)
                self.apply(
                    pool,
                    pool.acquire(
                        session.id,
                        request.mode,
                        request.identity,
                        request.replace,
                        renumbers=request.renumbers,
                        forbidden=lambda: writing_forbidden(session, pool, self._accounts),
                    ),
                )
                granted = await session.answer(
                    pool.name, request.timeout_s, ended, lambda: self.apply(pool, pool.withdraw(session.id, request.timeout_s))
                )
            finally:
                self.forget_if_idle(pool)
        answer: GrantWrite | GrantRead = granted
        match answer:
            case GrantWrite():
                await session.send(WriteGranted(pool.name, answer.generation), ())
            case GrantRead():
                self._tell(Kind.POOL_LEASE_GRANTED, pool.name, session=session.id, pid=session.peer.pid, generation=answer.layout.generation)
                await session.send(ReadGranted(pool.name, answer.layout), ())

    async def allocate(self, session: Session, request: Allocate, ended: asyncio.Event) -> None:
        """Create memory in a draft."""
        check_wait(request.timeout_s, self._limits.wait_s)
        pool = self.find(request.pool)
        before = pool.writing(session.id).added(request.batch) if request.batch else {}
        if before:
            await send_descriptors(self._memory, session, list(before.items()))
            return
        pool.writing(session.id)  # refuses who is not the writer, before any memory is made
        with self._accounts.memory(session.peer.uid, pool.name, request.sizes):
            made = await session.memory(self._memory, request.sizes, request.timeout_s, ended, pool.name)
            try:
                pool.add(session.id, [(identifier, owned.size) for identifier, owned in made], request.batch)
            except LeaseConflict:
                self._memory.free(identifier for identifier, _ in made)  # the session ended meanwhile
                raise
        self._changed(pool.name, [])
        await send_descriptors(self._memory, session, [(identifier, owned.size) for identifier, owned in made])

    async def commit(self, session: Session, request: Commit) -> None:
        """Publish a draft."""
        check_metadata(self._limits, request.identity, request.manifest)
        pool = self.find(request.pool)
        before = pool.granted(session.id) if session.repeats else None
        if isinstance(before, GrantRead):
            sealed = self._memory.seal(allocation.id for allocation in before.layout.allocations)
            await session.send(ReadGranted(pool.name, _without_manifest(before.layout), sealed), ())
            return
        draft = pool.check_commit(session.id, request.allocations)
        if request.pin:
            check_pins(self._limits, pool.name, pool.generations.pins)
        self._accounts.check_layout(session.peer.uid, pool, request.identity, request.manifest)
        granularity = self._memory.driver.granularity
        if wrong := [allocation.id for allocation in request.allocations if allocation.offset % granularity]:
            raise InvalidArgument(f"the offsets of allocations {wrong[:5]} are not multiples of {granularity} bytes: no reader could map them")
        sealed = self._memory.seal(allocation.id for allocation in request.allocations)  # before any reader can map it
        self._accounts.committed(session.peer.uid, pool.name, draft.generation)  # before: who waits to write is asked for its right at once
        self.apply(pool, pool.commit(session.id, request.allocations, request.manifest, request.identity, pin=request.pin), session.id)
        granted = session.answers.get_nowait()
        if not isinstance(granted, GrantRead):
            raise ProtocolError("a commit was not answered by a read lease")
        self._changed(pool.name, [session.id])
        await session.send(ReadGranted(pool.name, _without_manifest(granted.layout), sealed), ())

    async def discard(self, session: Session, request: Discard) -> None:
        """Take allocations out of a draft."""
        pool = self.find(request.pool)
        left = pool.allocations_of(session.id) if session.repeats else {}
        self.apply(pool, pool.discard(session.id, [one for one in request.ids if one in left] if session.repeats else request.ids))
        await session.send(Done(), ())

    def release(self, session: Session, name: str) -> None:
        """A session gives up what it has of a pool.

        Raises:
            PoolNotFound: There is no such pool.
        """
        if name in self.pools or not session.repeats:
            self._release(self.find(name), session.id)

    def closed(self, session: SessionId) -> None:
        """A session's connection has ended."""
        for pool in list(self.pools.values()):
            self._release(pool, session)

    def resume(self, pools: Mapping[str, PublishedPool], sessions: Mapping[SessionId, SessionRecord], forgotten: int) -> None:
        """Take pools over from the server before, with the leases of the sessions that may come back."""
        self.forgotten = forgotten
        self.pools.update(pools)
        self._seen.update({name: look_published(pool) for name, pool in pools.items()})
        for number, record in sessions.items():
            for name in record.leases.keys() & self.pools.keys():
                self.pools[name].resume_reader(number, record.leases[name], record.moves.get(name, 0))
        for pool in list(self.pools.values()):
            if pool.draft is not None and pool.draft.session not in sessions:
                self._release(pool, pool.draft.session)
            for gone in [number for number in pool.rollbacks if number not in sessions]:
                del pool.rollbacks[gone]
            self.apply(pool, pool.drop_unread())

    def covered(self, session: SessionId, request: Export) -> dict[int, int]:
        """Bytes by id of what an export may be of, in arena order. All of a lease is one generation; of two only those are had that are named."""
        pool = self.find(request.pool)
        return pool.exportable_to(session) if request.ids else pool.allocations_of(session)

    def leases_of(self, session: SessionId) -> dict[str, int]:
        """Generation that a session reads, by pool."""
        return {pool.name: pool.readers[session] for pool in self.pools.values() if session in pool.readers}

    def moves_of(self, session: SessionId) -> dict[str, int]:
        """Generation that a session is moving to, by pool."""
        return {pool.name: pool.generations.moving[session] for pool in self.pools.values() if session in pool.generations.moving}

    def values_of(self, name: str, written: Values) -> dict[str, bytes | None]:
        """What the journal has to say of a pool, apart from what it says already."""
        return pool_values(name, self.pools.get(name), written)

    @property
    def format(self) -> int:
        """Format of what is written of all of them; see `FORMATS`."""
        return FORMATS[-1] if any(pool.generations.origins for pool in self.pools.values()) else FORMATS[0]

    def _release(self, pool: PublishedPool, session: SessionId) -> None:
        had = pool.lease_of(session)
        self.apply(pool, pool.release(session))
        self._changed(pool.name, [session])
        self.forget_if_idle(pool)
        if had == "read":
            self._tell(Kind.POOL_LEASE_RELEASED, pool.name, session=session)

    def apply(self, pool: PublishedPool, effects: list[Effect], by: SessionId = NOBODY) -> None:
        """Carry out what a pool has decided, have it written down, and tell of it.

        Args:
            pool: That has decided.
            effects: What.
            by: Who asked for it, where that is to be told.
        """
        self._changed(pool.name, [effect.session for effect in effects if not isinstance(effect, Free)])
        before = self._seen.get(pool.name, NEW)
        if not same_published(pool, before) and self.pools.get(pool.name) is pool:  # one that is forgotten may still refuse somebody
            self._tell_changes(pool, before, by)
        for effect in effects:
            if isinstance(effect, Free):
                self._free(effect.ids)
            elif effect.session in self._sessions:
                self._sessions[effect.session].answers.put_nowait(effect)

    def _tell_changes(self, pool: PublishedPool, before: PublishedView, by: SessionId) -> None:
        seen = self._seen[pool.name] = look_published(pool)
        for kind, facts in published_changes(before, seen, by):
            session = self._sessions.get(SessionId(int(facts["session"]))) if "session" in facts else None
            self._tell(kind, pool.name, **facts, **({"pid": session.peer.pid} if session is not None else {}))

    def changed(self, pool: PublishedPool, session: SessionId) -> None:
        """Have written down what a session has of a pool."""
        self._changed(pool.name, [session])

    def find(self, name: str, *, create: bool = False) -> PublishedPool:
        """A pool by its name; with ``create`` a new one if there is none.

        Raises:
            PoolNotFound, InvalidArgument, LeaseConflict, QuotaExceeded: As they say.
        """
        pool = self.pools.get(name)
        if pool is None:
            if not create:
                raise PoolNotFound(f"this server has no pool {name!r}", hint=f"It has: {', '.join(sorted(self.pools)) or 'none'}.")
            check_name(name, others=self._others())
            if len(self.pools) >= self._limits.pools:
                for known in [known for known, pool in self.pools.items() if pool.empty]:
                    self._forget(known)
                    self._changed(known, [])
            if len(self.pools) >= self._limits.pools:
                raise QuotaExceeded(f"{self._limits.pools} pools exist already")
            pool = self.pools[name] = PublishedPool(name, self.forgotten)
        return pool

    def forget_if_idle(self, pool: PublishedPool) -> None:
        """Forget a pool that was never anything."""
        if pool.idle and self.pools.get(pool.name) is pool:  # another of its name may have been made since
            self._forget(pool.name)

    def _forget(self, name: str) -> None:
        self.forgotten = max(self.forgotten, self.pools.pop(name).generations.last)
        self._seen.pop(name, None)


def _without_manifest(layout: Layout) -> Layout:
    """The writer has just sent the manifest: it need not come back."""
    return Layout(layout.generation, layout.identity, layout.allocations, b"", layout.digest)
