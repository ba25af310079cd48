"""Carries out requests: sessions, their leases on pools, and the memory behind them. Knows connections only as something that sends."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence

from gms_core import __version__
from gms_core.errors import ConnectionLost, InvalidArgument, JournalUnavailable, LeaseConflict, ProtocolError, QuotaExceeded
from gms_core.events import Kind
from gms_core.protocol.generations import FEATURE, GenerationRequest
from gms_core.protocol.messages import (
    STAYS,
    Acquire,
    Allocate,
    AwaitRole,
    AwaitWhole,
    Beat,
    Commit,
    Depart,
    Discard,
    Done,
    Drop,
    Elect,
    Events,
    Export,
    Failure,
    HandOver,
    Hello,
    Hold,
    Instruct,
    Join,
    Message,
    Plan,
    Provide,
    Release,
    Report,
    Request,
    Status,
    StatusReport,
    Waiting,
    Welcome,
    WillNotify,
)
from gms_core.protocol.peer import PeerCredentials, process_started
from gms_core.quotas import Quota
from gms_core.server.accounts import Accounts
from gms_core.server.cohort_requests import CohortRequests
from gms_core.server.durable import Durable
from gms_core.server.effects import SessionId
from gms_core.server.exports import send_descriptors
from gms_core.server.generation_requests import GenerationRequests
from gms_core.server.grace import Grace
from gms_core.server.handshake import agreed_version
from gms_core.server.journal import Journal
from gms_core.server.kinds import GRANTING, IDLE, added_bytes, written_again
from gms_core.server.limits import Limits, check_metadata, check_name, printable
from gms_core.server.memory import Memory
from gms_core.server.observer import Observer
from gms_core.server.published_requests import PublishedRequests
from gms_core.server.records import About
from gms_core.server.report import status_report, tell_of_start
from gms_core.server.retained_requests import RetainedRequests
from gms_core.server.rights import check_rights
from gms_core.server.seat import Claim
from gms_core.server.sessions import Send, Session, detached
from gms_core.server.state import State, boot_id, encode, encode_all

log = logging.getLogger(__name__)


class Service:
    """The state of one device server.

    Args:
        device: UUID of the device, or ``host``.
        memory: Its allocations.
        limits: Bounds on what clients may cost.
        journal: Where the state is written for the next server; None for a server that nothing outlives.
        on_hand_over: Called when another server is to take over; this one has to end without releasing anything. None to refuse.
        quotas: What users and pools may have.
    """

    def __init__(
        self,
        device: str,
        memory: Memory,
        limits: Limits,
        journal: Journal | None = None,
        on_hand_over: Callable[[], None] | None = lambda: None,
        quotas: Sequence[Quota] = (),
    ) -> None:
        self.device = device
        self._on_hand_over = on_hand_over
        self.memory = memory
        self.limits = limits
        self.sessions: dict[SessionId, Session] = {}
        self.accounts = Accounts(self.sessions, quotas, os.getuid())
        self.observer = Observer()
        memory.tell = tell = self.observer.tell
        self.published: PublishedRequests
        self.retained: RetainedRequests
        self.engines: CohortRequests
        self._label = ""
        self._resumable = journal is not None
        self.durable = Durable(
            journal,
            each={
                "about": lambda _, __: {"about/": encode(self._about())},
                "pool": lambda name, written: self.published.values_of(name, written),
                "session": lambda number, _: {f"session/{number}": self._session_value(SessionId(int(number)))},
            },
            every={
                "cohort": lambda: encode_all(self.engines.records()),
                "lock": lambda: encode_all({name: seat.record for name, seat in self.engines.locks.items()}),
                "retained": lambda: encode_all(self.retained.records()),
                "ended": lambda: encode_all({"cohorts": self.engines.cohorts.ended}),
                "owners": lambda: encode_all({"all": self.accounts.record()}),
            },
        )
        self.published = PublishedRequests(
            self.sessions,
            memory,
            limits,
            self.accounts,
            free=self._free,
            changed=lambda pool, changed: self.durable.touch("about/", "owners", f"pool/{pool}", *(f"session/{number}" for number in changed)),
            others=lambda: self.retained.pools,
            tell=tell,
        )
        self.generations = GenerationRequests(self.published, limits, self.accounts, tell)
        self.retained = RetainedRequests(
            self.sessions,
            memory,
            limits,
            self.accounts,
            free=self._free,
            changed=lambda changed: self.durable.touch("about/", "owners", "retained", *(f"session/{number}" for number in changed)),
            tell=tell,
        )
        self.engines = CohortRequests(
            self.sessions,
            limits,
            changed=lambda: self.durable.touch("cohort", "lock", "ended"),
            ending=self.retained.cohort_ends,
            mute=self.retained.cohort_mute,
            gone=self.retained.cohort_gone,
            failed=self.retained.fence_failed,
            observer=self.observer,
        )
        self.accounts.published, self.accounts.retained = self.published.pools, self.retained.pools
        self.grace = Grace(self.sessions, limits.grace_s, self._give_up)
        self._last_session, self._stopping = 0, False
        self.started = time.monotonic()

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
        version = agreed_version(hello, self.device)
        if hello.resume:
            session = self._resumed(hello, peer)
        else:
            if len(self.sessions) >= self.limits.sessions:
                raise QuotaExceeded(f"{self.limits.sessions} sessions are open already")
            self.durable.reserve()
            self.accounts.opened(peer.uid)
            token = secrets.token_hex(16) if self._resumable and version >= 2 else ""
            self._last_session += 1
            client = printable(hello.client, self.limits)
            session = Session(SessionId(self._last_session), peer, client, send, open_pidfd, token=token, started=process_started(peer.pid))

        async def send_when_written(message: Message, descriptors: tuple[int, ...]) -> None:
            if session.promises and not isinstance(message, Waiting | Failure):  # those promise nothing
                try:
                    self.durable.write()
                except JournalUnavailable as error:  # to refuse now would be a lie, since it is done: with its connection it is released
                    raise ConnectionAbortedError(error.message) from error
            await send(message, descriptors)

        session.send, session.open_pidfd, session.repeats = send_when_written, open_pidfd, hello.repeats
        driver = self.memory.driver
        grace_s = self.limits.keep_s if session.token else 0.0
        features = (FEATURE,) if self._on_hand_over is not None else (FEATURE, STAYS)
        welcome = Welcome(version, __version__, self.device, driver.name, driver.granularity, session.id, session.token, grace_s, features)
        self.durable.touch("about/", f"session/{session.id}")
        self.sessions[session.id] = session
        away_since, session.away_since = session.away_since, 0.0
        session.detached, session.overdue, session.promises = False, False, True
        try:
            await session.send(welcome, ())
        except BaseException:
            if hello.resume:  # this try was given up, and the client may be at its next one
                session.detached, session.away_since = True, away_since
                self.durable.touch(f"session/{session.id}")
                self.grace.wind()
            else:
                self.close(session)
            raise
        if hello.resume:
            self.engines.came_back(session)
            self.observer.tell(Kind.SESSION_RESUMED, str(session.id), **session.who)
        log.debug("session %d opened by pid %d (%s)", session.id, peer.pid, session.client)
        return session

    def _resumed(self, hello: Hello, peer: PeerCredentials) -> Session:
        """The session of the server before that a client comes back to."""
        session = self.sessions.get(SessionId(hello.session))
        if session is None or not session.is_resumed_by(hello.resume, peer):
            raise ConnectionLost(f"this server does not know session {hello.session}, or no longer: what it had is released")
        return session

    def close(self, session: Session) -> None:
        """The connection has ended: whatever the session had is released."""
        if self.sessions.pop(session.id, None) is None or self._stopping:
            return
        self.accounts.closed(session.peer.uid)
        self.durable.touch(f"session/{session.id}")
        self.published.closed(session.id)
        try:
            self.engines.closed(session)  # first: what is freed below must not be granted before its holder is known to be ending
        finally:
            self.retained.closed(session.id)
        log.debug("session %d closed", session.id)

    def adopt(self, state: State, label: str) -> None:
        """Take over what the server before this one has written down. Nobody has connected yet.

        Args:
            state: All of it.
            label: Of the keeper that has the memory from now on.
        """
        self._label = label
        tell_of_start(self.observer, self.device, state)
        self._last_session = state.about.session if state.about else 0
        for number, record in state.sessions.items():
            self.sessions[number] = detached(number, record)
            self.accounts.resumed(record.uid)
        self.accounts.resume(state.owners)
        self.engines.resume(state.cohorts, state.ended, state.locks)
        self.retained.resume(state.retained, with_memory=state.with_memory)
        self.published.resume(state.pools, state.sessions, state.about.generation if state.about else 0)
        for number, record in state.sessions.items():
            if (cohort := self.engines.cohorts.joined(number)) is not None:
                for name in record.uses:
                    self.retained.resume_user(name, Claim(number, cohort.name, cohort.engine))
        for retained in list(self.retained.pools.values()):
            if retained.planner is not None and retained.planner.claim.session not in self.sessions:
                self.retained.closed(retained.planner.claim.session)
        self.durable.touch("about/", "cohort", "lock", "ended", "owners", "retained", *(f"session/{number}" for number in state.numbers))
        self.engines.watch()
        gone = [session for session in self.sessions.values() if session.started and process_started(session.peer.pid) != session.started]
        for session in gone:
            self.close(session)
        self.grace.begin()

    def _give_up(self, session: Session) -> None:
        """Whoever has not come back by now has lost what it had; but no engine is ended because it is slow, as long as its process lives."""
        if self.engines.cohorts.joined(session.id) is None or process_started(session.peer.pid) != session.started:
            self.observer.tell(Kind.SESSION_LOST, str(session.id), **session.who, seconds=self.limits.grace_s)
            self.close(session)

    def _drop_stale(self, session: Session, cohort: str) -> None:
        """A process has joined a cohort anew: sessions of it that it has not come back to, and will not, are no members any more."""
        for stale in [other for other in self.sessions.values() if other.detached and other.overdue and other.is_of(session)]:
            joined = self.engines.cohorts.joined(stale.id)
            if joined is not None and joined.name == cohort:
                self.engines.forget(stale.id, session.id)
                self.close(stale)

    def _about(self) -> About:
        format_, generation = self.published.format, self.published.forgotten
        return About(format_, self.device, self._label, boot_id(), self._last_session, self.memory.last, self.observer.restarts, generation)

    def _session_value(self, number: SessionId) -> bytes | None:
        session = self.sessions.get(number)
        if session is None or not session.token:
            return None
        return encode(session.record(self.published.leases_of(number), self.retained.used_by(number), self.published.moves_of(number)))

    def stop(self) -> None:
        """The server is about to end its connections, by its own will: that says nothing about the engines, so none is ended for it."""
        self._stopping = True
        self.grace.close()
        self.engines.close()
        self.durable.write_if_possible()

    async def handle(self, session: Session, request: Request, ended: asyncio.Event) -> None:
        """Carry out one request and send its replies.

        Raises:
            GmsError: The request is refused; the caller tells the client.
        """
        session.promises = not isinstance(request, IDLE)
        with self.observer.counting(request):
            try:
                check_rights(session, request, self.accounts, self.sessions, self.engines.cohorts.by_name, self.engines.locks)
                if isinstance(request, GRANTING) and not session.repeats:  # one that was carried out needs no room, and must not be refused
                    self.durable.reserve(added_bytes(request) + sum(map(self.durable.size, written_again(request))))
                await self._handle(session, request, ended)
            finally:
                session.repeats, session.promises = False, True

    async def _handle(self, session: Session, request: Request, ended: asyncio.Event) -> None:
        match request:
            case Acquire():
                await self.published.acquire(session, request, ended)
            case Allocate():
                await self.published.allocate(session, request, ended)
            case Export():
                await self._export(session, request)
            case Discard():
                await self.published.discard(session, request)
            case Commit():
                await self.published.commit(session, request)
            case Release():
                if request.pool in self.retained.pools:
                    self.retained.release(session, self.retained.pools[request.pool])
                else:
                    self.published.release(session, request.pool)
                await session.send(Done(), ())
            case Join():
                await self.engines.join(session, request)
                self._drop_stale(session, request.cohort)  # not before: a process is watched at every moment, and its exit frees its locks
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
                self.durable.write_if_possible()  # an operator is obeyed on a full disk too
                await session.send(Done(), ())
            case _ if isinstance(request, GenerationRequest):
                await self.generations.handle(session, request, ended)
            case Plan():
                check_metadata(self.limits, request.identity)
                check_name(request.pool, others=self.published.pools)
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
                await session.send(await self.report(brief=request.brief), ())
            case Events():
                await self.observer.events(session, request, ended, self.limits.wait_s)
            case HandOver():
                if self._on_hand_over is None:
                    raise InvalidArgument("systemd starts the next server of this device", hint="Run systemctl restart with the name of its unit.")
                self.observer.tell(Kind.SERVER_HANDED_OVER, self.device, pid=session.peer.pid)
                await session.send(Done(), ())
                self._on_hand_over()
            case Hello():
                raise ProtocolError("the handshake is over")

    async def _export(self, session: Session, request: Export) -> None:
        retained = self.retained.pools.get(request.pool)
        covered = retained.allocations_of(session.id) if retained is not None else self.published.covered(session.id, request)
        if strange := [identifier for identifier in request.ids if identifier not in covered]:
            raise LeaseConflict(f"allocations {strange[:5]} are not covered by this session's lease on pool {request.pool!r}")
        await send_descriptors(self.memory, session, [(identifier, covered[identifier]) for identifier in request.ids or covered])

    def _free(self, ids: Sequence[int]) -> None:
        """Free memory once it is written down that nothing refers to it: the next server must not look for what is not there."""
        self.durable.after(lambda: self.memory.free(ids))

    async def report(self, *, brief: bool = False) -> StatusReport:
        """The state at one instant."""
        return await status_report(self, brief=brief)
