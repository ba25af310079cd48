"""Carries out requests: sessions, their leases on pools, and the memory behind them. Knows connections only as something that sends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection

from gms_core import __version__
from gms_core.errors import GmsError, InvalidArgument, LeaseConflict, PoolNotFound, ProtocolError, QuotaExceeded, VersionMismatch, WrongDevice
from gms_core.layout import Identity, Layout
from gms_core.protocol.framing import batches
from gms_core.protocol.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Allocate,
    AwaitRole,
    AwaitWhole,
    Beat,
    Commit,
    Depart,
    Descriptors,
    Discard,
    Done,
    Drop,
    Elect,
    Export,
    Failure,
    Hello,
    Hold,
    Instruct,
    Join,
    Message,
    Plan,
    Provide,
    ReadGranted,
    Release,
    Report,
    Request,
    Status,
    StatusReport,
    Welcome,
    WillNotify,
    WriteGranted,
)
from gms_core.protocol.peer import PeerCredentials
from gms_core.server.cohort_requests import CohortRequests
from gms_core.server.effects import Free, SessionId
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.published import Effect, GrantRead, GrantWrite, PublishedPool
from gms_core.server.report import pool_status, session_status
from gms_core.server.retained_requests import RetainedRequests
from gms_core.server.sessions import Send, Session, check_wait

log = logging.getLogger(__name__)


class Service:
    """The state of one device server.

    Args:
        device: UUID of the device, or ``host``.
        memory: Its allocations.
        limits: Bounds on what clients may cost.
    """

    def __init__(self, device: str, memory: Memory, limits: Limits) -> None:
        self.device = device
        self.memory = memory
        self.limits = limits
        self.sessions: dict[SessionId, Session] = {}
        self.pools: dict[str, PublishedPool] = {}
        self.retained = RetainedRequests(self.sessions, memory, limits)
        self.engines = CohortRequests(
            self.sessions,
            limits,
            ending=self.retained.cohort_ends,
            mute=self.retained.cohort_mute,
            gone=self.retained.cohort_gone,
            failed=self.retained.fence_failed,
        )
        self._numbers = itertools.count(1)
        self._stopping = False
        self._started = time.monotonic()

    async def open(self, hello: Hello, peer: PeerCredentials, send: Send, open_pidfd: Callable[[], int]) -> Session:
        """Answer a `Hello` and make the session.

        Args:
            hello: The client's first message.
            peer: Who connected.
            send: Sends it a message.
            open_pidfd: Gives a new descriptor of its process.

        Raises:
            VersionMismatch, WrongDevice, QuotaExceeded: As they say.
        """
        if PROTOCOL_VERSION not in hello.versions:
            raise VersionMismatch(
                f"this server (gms {__version__}) speaks protocol version {PROTOCOL_VERSION}, the client {list(hello.versions)}",
                hint="Install the same version of gms in the engine's environment as the server runs.",
            )
        if hello.device and hello.device != self.device:
            raise WrongDevice(f"this server owns the memory of {self.device}, not of {hello.device}")
        if len(self.sessions) >= self.limits.sessions:
            raise QuotaExceeded(f"{self.limits.sessions} sessions are open already")
        session = Session(SessionId(next(self._numbers)), peer, hello.client, send, open_pidfd)
        driver = self.memory.driver
        await send(Welcome(PROTOCOL_VERSION, __version__, self.device, driver.name, driver.granularity, session.id), ())
        self.sessions[session.id] = session  # only now: a client that has gone meanwhile has no session that could be closed
        log.debug("session %d opened by pid %d (%s)", session.id, peer.pid, hello.client)
        return session

    def close(self, session: Session) -> None:
        """The connection has ended: whatever the session had is released."""
        if self.sessions.pop(session.id, None) is None or self._stopping:
            return
        for pool in list(self.pools.values()):
            self._release(pool, session)
        try:
            self.engines.closed(session)  # first: what is freed below must not be granted before its holder is known to be ending
        finally:
            self.retained.closed(session)
        log.debug("session %d closed", session.id)

    def stop(self) -> None:
        """The server is about to end its connections, by its own will: that says nothing about the engines, so none is ended for it."""
        self._stopping = True
        self.engines.close()

    async def handle(self, session: Session, request: Request, ended: asyncio.Event) -> None:
        """Carry out one request and send its replies.

        Raises:
            GmsError: The request is refused; the caller tells the client.
        """
        match request:
            case Acquire():
                await self._acquire(session, request, ended)
            case Allocate():
                await self._allocate(session, request, ended)
            case Export():
                await self._export(session, request)
            case Discard():
                self._apply(self._pool(request.pool).discard(session.id, request.ids))
                await session.send(Done(), ())
            case Commit():
                await self._commit(session, request)
            case Release():
                if request.pool in self.retained.pools:
                    self.retained.release(session, self.retained.pools[request.pool])
                else:
                    self._release(self._pool(request.pool), session)
                await session.send(Done(), ())
            case Join():
                await self.engines.join(session, request)
            case WillNotify():
                await self.engines.will_notify(session)
            case Report():
                await self.engines.report(session, request)
            case Beat():
                await self.engines.beat(session, request)
            case Depart():
                await self.engines.depart(session, request)
            case Elect():
                await self.engines.elect(session, request, ended)
            case AwaitRole():
                await self.engines.await_role(session, request, ended)
            case Instruct():
                self.engines.instruct(request)
                if request.order == "promote":
                    self.retained.prefer(request.cohort)
                await session.send(Done(), ())
            case Plan():
                self._check_metadata(request.identity)
                self._check_name(request.pool, others=self.pools)
                await self.retained.plan(session, request, self.engines.claim(session), ended)
            case Provide():
                await self.retained.provide(session, request, ended)
            case Hold():
                first = self.engines.goes_first(self.engines.claim(session))
                await self.retained.hold(session, request, first=first, ended=ended)
            case AwaitWhole():
                self.engines.claim(session)
                await self.retained.await_whole(session, request, ended)
            case Drop():
                await self.retained.drop(session, request)
            case Status():
                await session.send(await self.report(), ())
            case Hello():
                raise ProtocolError("the handshake is over")

    async def _acquire(self, session: Session, request: Acquire, ended: asyncio.Event) -> None:
        check_wait(request.timeout_s, self.limits.wait_s)
        self._check_metadata(request.identity)
        pool = self._pool(request.pool, create=True)
        self._apply(pool.acquire(session.id, request.mode, request.identity, request.replace))
        try:
            answer: GrantWrite | GrantRead = await session.answer(
                pool.name, request.timeout_s, ended, lambda: self._apply(pool.withdraw(session.id, request.timeout_s))
            )
        finally:
            self._forget_if_idle(pool)
        match answer:
            case GrantWrite():
                log.info("pool %s: session %d (pid %d) writes generation %d", pool.name, session.id, session.peer.pid, answer.generation)
                await session.send(WriteGranted(pool.name, answer.generation), ())
            case GrantRead():
                log.info("pool %s: session %d (pid %d) reads generation %d", pool.name, session.id, session.peer.pid, answer.layout.generation)
                await session.send(ReadGranted(pool.name, answer.layout), ())

    async def _allocate(self, session: Session, request: Allocate, ended: asyncio.Event) -> None:
        check_wait(request.timeout_s, self.limits.wait_s)
        pool = self._pool(request.pool)
        pool.add(session.id, ())  # refuses who is not the writer, before any memory is made
        made = await self.memory.create(request.sizes, request.timeout_s, ended)
        try:
            pool.add(session.id, [(identifier, owned.size) for identifier, owned in made])
        except LeaseConflict:
            self.memory.free(identifier for identifier, _ in made)  # the session ended meanwhile
            raise
        await self._send_descriptors(session, [(identifier, owned.size) for identifier, owned in made])

    async def _export(self, session: Session, request: Export) -> None:
        pool = self.retained.pools.get(request.pool) or self._pool(request.pool)
        covered = pool.allocations_of(session.id)
        if strange := [identifier for identifier in request.ids if identifier not in covered]:
            raise LeaseConflict(f"allocations {strange[:5]} are not covered by this session's lease on pool {request.pool!r}")
        await self._send_descriptors(session, [(identifier, covered[identifier]) for identifier in request.ids or covered])

    async def _send_descriptors(self, session: Session, allocations: list[tuple[int, int]]) -> None:
        pieces = batches(allocations)
        for number, piece in enumerate(pieces, start=1):
            ids, sizes = tuple(identifier for identifier, _ in piece), tuple(size for _, size in piece)
            await session.send(Descriptors(ids, sizes, more=number < len(pieces)), tuple(self.memory.descriptors(ids)))

    async def _commit(self, session: Session, request: Commit) -> None:
        self._check_metadata(request.identity, request.manifest)
        pool = self._pool(request.pool)
        pool.check_commit(session.id, request.allocations)
        granularity = self.memory.driver.granularity
        if wrong := [allocation.id for allocation in request.allocations if allocation.offset % granularity]:
            raise InvalidArgument(f"the offsets of allocations {wrong[:5]} are not multiples of {granularity} bytes: no reader could map them")
        sealed = self.memory.seal(allocation.id for allocation in request.allocations)  # before any reader can map it
        self._apply(pool.commit(session.id, request.allocations, request.manifest, request.identity))
        granted = session.answers.get_nowait()
        if not isinstance(granted, GrantRead):
            raise ProtocolError("a commit was not answered by a read lease")
        layout = granted.layout
        log.info("pool %s: session %d committed generation %d, %d bytes", pool.name, session.id, layout.generation, layout.size)
        await session.send(ReadGranted(pool.name, _without_manifest(layout), sealed), ())

    def _release(self, pool: PublishedPool, session: Session) -> None:
        had = pool.lease_of(session.id)
        self._apply(pool.release(session.id))
        self._forget_if_idle(pool)
        if had:
            log.info("pool %s: session %d gave up its %s lease", pool.name, session.id, had)

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Free):
                self.memory.free(effect.ids)
            elif effect.session in self.sessions:
                self.sessions[effect.session].answers.put_nowait(effect)

    def _pool(self, name: str, *, create: bool = False) -> PublishedPool:
        pool = self.pools.get(name)
        if pool is None:
            if not create:
                raise PoolNotFound(f"this server has no pool {name!r}", hint=f"It has: {', '.join(sorted(self.pools)) or 'none'}.")
            self._check_name(name, others=self.retained.pools)
            if len(self.pools) >= self.limits.pools:
                self.pools = {known: pool for known, pool in self.pools.items() if not pool.empty}
            if len(self.pools) >= self.limits.pools:
                raise QuotaExceeded(f"{self.limits.pools} pools exist already")
            pool = self.pools[name] = PublishedPool(name)
        return pool

    def _forget_if_idle(self, pool: PublishedPool) -> None:
        if pool.idle and self.pools.get(pool.name) is pool:  # another of its name may have been made since
            del self.pools[pool.name]

    def _check_name(self, name: str, *, others: Collection[str]) -> None:
        """Refuse what cannot be the name of a pool, or is that of a pool of the other class."""
        if not (0 < len(name) <= 64 and name.replace("_", "").replace("-", "").replace(".", "").isalnum() and name.isascii()):
            raise InvalidArgument(f"{name[:70]!r} is not a name of a pool", hint="Use up to 64 letters, digits, '.', '_' and '-'.")
        if name in others:
            raise LeaseConflict(f"pool {name!r} is of the other class: weights are published, KV memory is retained", hint="Use another tag.")

    def _check_metadata(self, identity: Identity, manifest: bytes = b"") -> None:
        size = len(manifest) + sum(len(name) + len(value) for name, value in identity.fields.items())
        if size > self.limits.metadata_bytes:
            raise QuotaExceeded(f"{size} bytes of metadata are over the limit of {self.limits.metadata_bytes}")

    async def report(self) -> StatusReport:
        """The state at one instant."""
        info = await self.memory.info()
        return StatusReport(
            server=__version__,
            pid=os.getpid(),
            device=self.device,
            driver=self.memory.driver.name,
            uptime_s=time.monotonic() - self._started,
            memory_free=info.free,
            memory_total=info.total,
            allocated_bytes=self.memory.bytes,
            allocations=len(self.memory),
            waiting_for_memory=self.memory.waiting,
            pools=tuple(pool_status(pool) for _, pool in sorted(self.pools.items())),
            sessions=tuple(session_status(session, self.pools.values()) for _, session in sorted(self.sessions.items())),
            retained=self.retained.status(),
            cohorts=self.engines.status(),
            locks=self.engines.lock_status(),
            ends=tuple(self.engines.ends),
        )


def _without_manifest(layout: Layout) -> Layout:
    """The writer has just sent the manifest: it need not come back."""
    return Layout(layout.generation, layout.identity, layout.allocations, b"", layout.digest)


def refusal(error: GmsError) -> Message:
    """The message that tells a client of an error."""
    return Failure(error.code, error.message, error.hint, error.details)
