"""Who has what: the memory and the metadata of each user in each pool, for the quotas and for what users may do to one another's pools.

What everybody has is read off the pools each time, so it is exact whatever has happened to them: a release, a refusal, a death, a takeover. Only who
has made a layout or a plan is not known there, and is kept here.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from gms_core.layout import Identity, Layout
from gms_core.protocol.peer import PeerCredentials
from gms_core.protocol.status import QuotaStatus
from gms_core.quotas import EACH, Holding, Quota, Scope, check, check_one, effective, used
from gms_core.server.effects import SessionId
from gms_core.server.limits import metadata_bytes
from gms_core.server.published import PublishedPool
from gms_core.server.records import OwnersRecord
from gms_core.server.retained import RetainedPool


class Owner(Protocol):
    """Whoever asks for something: a session."""

    @property
    def id(self) -> SessionId:
        """Its number."""

    @property
    def peer(self) -> PeerCredentials:
        """Who connected."""


class Accounts:
    """What the users of one server have.

    Args:
        sessions: All that are open.
        quotas: What they may have.
        own_uid: Of the server; whatever nobody is known to have made counts as its own.
    """

    def __init__(self, sessions: Mapping[SessionId, Owner], quotas: Sequence[Quota], own_uid: int) -> None:
        self.published: Mapping[str, PublishedPool] = {}
        self.retained: Mapping[str, RetainedPool] = {}
        self.own_uid = own_uid
        self._sessions = sessions
        self._quotas = tuple(quotas)
        self._open: Counter[int] = Counter()
        self._layouts: dict[str, dict[int, int]] = {}
        self._plans: dict[str, int] = {}
        self._asked: list[Holding] = []

    def opened(self, uid: int) -> None:
        """A session begins.

        Raises:
            QuotaExceeded: The user has as many as it may have.
        """
        for quota in effective(self._quotas, "user", str(uid)):
            if quota.resource == "sessions":
                check_one(quota, str(uid), self._open[uid], 1)
        self._open[uid] += 1

    def resumed(self, uid: int) -> None:
        """A session of the server before goes on; no quota can undo it."""
        self._open[uid] += 1

    def closed(self, uid: int) -> None:
        """A session has ended."""
        self._open[uid] -= 1
        if self._open[uid] <= 0:
            del self._open[uid]

    def check_joins(self, pool: str, session: SessionId) -> None:
        """Refuse one more session in a pool that has as many as it may have.

        Raises:
            QuotaExceeded: It has.
        """
        for quota in effective(self._quotas, "pool", pool):
            if quota.resource == "sessions" and session not in (there := self._sessions_of(pool)):
                check_one(quota, pool, len(there), 1)

    @contextlib.contextmanager
    def memory(self, uid: int, pool: str, sizes: Sequence[int]) -> Iterator[None]:
        """Count memory that a user asks for, until the pool has it.

        Raises:
            QuotaExceeded: It is more than the user or the pool may have.
        """
        wanted = Holding(uid, pool, sum(sizes), len(sizes))
        if self._quotas:
            check(self._quotas, wanted, list(self._holdings()))
        self._asked.append(wanted)
        try:
            yield
        finally:
            self._asked.remove(wanted)

    def check_layout(self, uid: int, pool: PublishedPool, identity: Identity, manifest: bytes) -> None:
        """Refuse a commit whose metadata is more than the user or the pool may have.

        Raises:
            QuotaExceeded: It is.
        """
        if self._quotas:
            check(self._quotas, Holding(uid, pool.name, metadata=metadata_bytes(identity, manifest)), list(self._holdings(committing=pool)))

    def check_plan(self, uid: int, pool: str, plan: bytes) -> None:
        """Refuse a plan that is larger than the user or the pool may have.

        Raises:
            QuotaExceeded: It is.
        """
        if self._quotas:
            check(self._quotas, Holding(uid, pool, metadata=len(plan)), list(self._holdings()))

    def committed(self, uid: int, pool: str, generation: int) -> None:
        """A user has published a layout."""
        self._layouts.setdefault(pool, {})[generation] = uid

    def rolled_back(self, pool: str, to: int, generation: int) -> None:
        """A layout was published once more: it is still of the user who has made it, whoever brought it back."""
        owners = self._layouts.setdefault(pool, {})
        owners[generation] = owners.get(to, self.own_uid)

    def planned(self, uid: int, pool: str) -> None:
        """A user has made the memory of a retained pool."""
        self._plans[pool] = uid

    def writer_of(self, pool: PublishedPool) -> int | None:
        """Whose the pool is: of the user who writes it, or else has published the last of what it has; None if it is nobody's."""
        if pool.draft is not None and (session := self._sessions.get(pool.draft.session)) is not None:
            return session.peer.uid
        return self.last_maker_of(pool)

    def last_maker_of(self, pool: PublishedPool) -> int | None:
        """The user who has published the last of what a pool has; None if it has nothing."""
        return self.maker_of(pool, max(pool.generations.all(), default=0))

    def maker_of(self, pool: PublishedPool, generation: int) -> int | None:
        """The user who has published a generation; None if it is not there."""
        return self._layouts.get(pool.name, {}).get(generation, self.own_uid) if pool.generations.find(generation) is not None else None

    def planner_of(self, pool: RetainedPool) -> int | None:
        """Whose a retained pool is: of the user who plans or has planned it; None if it is nobody's."""
        if pool.identity is not None:
            return self._plans.get(pool.name, self.own_uid)
        session = self._sessions.get(pool.planner.claim.session) if pool.planner is not None else None
        return session.peer.uid if session is not None else None

    def record(self) -> OwnersRecord:
        """What the next server has to know; what is there no more is forgotten."""
        layouts = {
            name: kept for name, owners in self._layouts.items() if (kept := {number: owners[number] for number in owners if self._has(name, number)})
        }
        plans = {name: uid for name, uid in self._plans.items() if (pool := self.retained.get(name)) is not None and pool.identity is not None}
        self._layouts, self._plans = layouts, plans
        return OwnersRecord({name: dict(owners) for name, owners in layouts.items()}, dict(plans))

    def resume(self, record: OwnersRecord) -> None:
        """Take over what the server before has written down."""
        self._layouts, self._plans = {name: dict(owners) for name, owners in record.layouts.items()}, dict(record.plans)

    def status(self) -> tuple[QuotaStatus, ...]:
        """How much of each quota is used, by everyone whom it holds for and who has anything."""
        holdings = list(self._holdings())
        subjects: dict[Scope, set[str]] = {
            "user": {str(one.uid) for one in holdings} | {str(uid) for uid in self._open},
            "pool": {one.pool for one in holdings} | {*self.published, *self.retained},
        }
        for quota in self._quotas:
            if quota.who != EACH:
                subjects[quota.scope].add(quota.who)
        return tuple(
            QuotaStatus(scope, who, quota.resource, self._used(quota, who, holdings), quota.limit)
            for scope, names in subjects.items()
            for who in sorted(names)
            for quota in effective(self._quotas, scope, who)
        )

    def _used(self, quota: Quota, who: str, holdings: Sequence[Holding]) -> int:
        if quota.resource != "sessions":
            return used(quota, who, holdings)
        return self._open[int(who)] if quota.scope == "user" else len(self._sessions_of(who))

    def _has(self, name: str, generation: int) -> bool:
        pool = self.published.get(name)
        return pool is not None and pool.generations.find(generation) is not None

    def _sessions_of(self, name: str) -> set[SessionId]:
        """Those that use a pool, or wait for something of it."""
        if (published := self.published.get(name)) is not None:
            writer = {published.draft.session} if published.draft is not None else set()
            return {*published.readers, *published.watchers, *(waiter.session for waiter in published.queue), *writer}
        if (retained := self.retained.get(name)) is not None:
            planner = (retained.planner,) if retained.planner is not None else ()
            return {*retained.users, *(asking.claim.session for asking in (*retained.asking, *planner))}
        return set()

    def _holdings(self, committing: PublishedPool | None = None) -> Iterator[Holding]:
        """What everybody has.

        Args:
            committing: A pool that is about to commit: what will go with that counts no more.
        """
        for pool in self.published.values():
            if pool.draft is not None and pool.draft.sizes:
                session = self._sessions.get(pool.draft.session)
                uid = session.peer.uid if session is not None else self.own_uid
                yield Holding(uid, pool.name, sum(pool.draft.sizes.values()), len(pool.draft.sizes))
            layouts = pool.generations.all()
            staying = pool.generations.kept if pool is committing else layouts.keys()
            once = {pool.generations.origin(generation): one for generation, one in layouts.items() if generation in staying}
            yield from (self._of_layout(pool.name, layout) for layout in once.values())
        for retained in self.retained.values():
            if retained.identity is not None:
                allocations = (*retained.allocations, *retained.spares)
                size = sum(allocation.size for allocation in allocations)
                metadata = metadata_bytes(retained.identity, retained.plan)
                yield Holding(self._plans.get(retained.name, self.own_uid), retained.name, size, len(allocations), metadata)
        yield from self._asked

    def _of_layout(self, name: str, layout: Layout) -> Holding:
        uid = self._layouts.get(name, {}).get(layout.generation, self.own_uid)
        return Holding(uid, name, layout.size, len(layout.allocations), metadata_bytes(layout.identity, layout.manifest))
