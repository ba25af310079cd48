"""Carries out the requests of engines: their cohorts, their roles, and the locks that elect a primary."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from gms_core.errors import GmsError, InvalidArgument, PoolNotFound, QuotaExceeded
from gms_core.events import Kind
from gms_core.protocol.messages import (
    AwaitRole,
    Beat,
    CohortStatus,
    Depart,
    Done,
    Elect,
    Elected,
    EndStatus,
    Instruct,
    Join,
    Joined,
    LockStatus,
    MemberStatus,
    Orders,
    Report,
)
from gms_core.server.cohorts import Cohort, CohortEffect, Cohorts, Gone, Kill, Mute, RoleReached
from gms_core.server.effects import SessionId
from gms_core.server.fencing import Fencer
from gms_core.server.limits import Limits, check_label, printable
from gms_core.server.observer import Observer
from gms_core.server.records import CohortRecord, SeatRecord
from gms_core.server.seat import Claim, Seat, Seated, SeatEffect
from gms_core.server.sessions import Session, check_wait

ENDS = 64
"""Ends of cohorts that status tells of."""


class CohortRequests:
    """Cohorts and locks of one server.

    Args:
        sessions: All that are open.
        limits: Bounds on what clients may cost.
        ending: Called with a cohort and the reason as soon as it ends.
        mute: Called with a cohort that is ending once it can answer nobody any more.
        gone: Called with a cohort once every process of it has exited.
        failed: Called with a cohort and the error when it could not be ended, and whether that is final: it is not while its processes are only late.
        changed: Called when cohorts or locks may have changed.
        observer: Is told of what happens.
    """

    def __init__(
        self,
        sessions: Mapping[SessionId, Session],
        limits: Limits,
        *,
        ending: Callable[[str, str], None],
        mute: Callable[[str], None],
        gone: Callable[[str], None],
        failed: Callable[[str, GmsError, bool], None],
        changed: Callable[[], None] = lambda: None,
        observer: Observer,
    ) -> None:
        self.cohorts = Cohorts()
        self.locks: dict[str, Seat] = {}
        self.ends: deque[EndStatus] = deque(maxlen=ENDS)
        self._noticed: dict[str, tuple[str, str, float, bool]] = {}
        self._terms: dict[str, int] = {}
        self._observer = observer
        self._sessions = sessions
        self._limits = limits
        self._changed = changed
        self._ending_elsewhere, self._mute, self._gone, self._failed_elsewhere = ending, mute, gone, failed
        self._fencer = Fencer(
            self.cohorts, limits, apply=self._apply, ending=self._ending, exited=self._exited, failed=self._failed, tell=observer.tell
        )

    def resume(self, cohorts: Mapping[str, CohortRecord], ended: Sequence[str], locks: Mapping[str, SeatRecord]) -> None:
        """Take cohorts and locks over from the server before; see `watch`."""
        self.cohorts.resume(cohorts, ended, self._sessions)
        now = time.monotonic()
        for cohort in self.cohorts.by_name.values():
            if cohort.state == "departing":
                self._noticed[cohort.name] = (cohort.engine, f"{cohort.engine} is ending in an orderly way", now, False)
        for name, (number, holder, ending) in locks.items():
            self._lock(name).resume(number, holder, ending)
            self._terms[name] = number

    def watch(self) -> None:
        """Watch the processes of the cohorts that were taken over; those that have exited meanwhile are noticed now."""
        self._fencer.resume()

    def came_back(self, session: Session) -> None:
        """A session that was taken over is there again."""
        self._fencer.came_back(session.id)

    def forget(self, session: SessionId, successor: SessionId) -> None:
        """A session that was taken over will not come back: its process has joined with another one, which has its locks from now on."""
        for seat in self._owned(lambda claim: claim.session == session):
            seat.hand_on(successor)
        self.cohorts.forget(session)
        self._fencer.forget(session)
        self._changed()

    def records(self) -> dict[str, CohortRecord]:
        """All cohorts, for the next server."""
        return self.cohorts.records()

    def claim(self, session: Session) -> Claim:
        """Who a session is, when it asks for something that one engine at a time can have.

        Raises:
            LeaseConflict: Its process has joined no cohort.
            CohortFenced: Its cohort is being ended, or ends by itself.
        """
        cohort = self.cohorts.alive(session.id)
        return Claim(session.id, cohort.name, cohort.engine)

    def goes_first(self, claim: Claim) -> bool:
        """Whether an operator wants this engine to be the next primary."""
        return self.cohorts.by_name[claim.cohort].order == "promote"

    async def join(self, session: Session, request: Join) -> None:
        """Add the session's process to a cohort."""
        for what, name in (("a cohort", request.cohort), ("an engine", request.engine), ("a process", request.process)):
            check_label(name, what, self._limits)
        if not 0 <= request.deadline_s <= self._limits.wait_s:
            raise InvalidArgument(f"a deadline of {request.deadline_s} s is not between 0 and {self._limits.wait_s:g}")
        if request.cohort not in self.cohorts.by_name and len(self.cohorts.by_name) >= self._limits.cohorts:
            raise QuotaExceeded(f"{self._limits.cohorts} cohorts exist already")
        known = self.cohorts.joined(session.id)
        if session.repeats and known is not None and known.name == request.cohort:
            await session.send(Joined(notice=False), ())  # it has joined, but the page for the notice of its death went with the server
            return
        page = self._fencer.join(session, request)
        self._changed()
        await session.send(Joined(page is not None), () if page is None else (page,))

    async def will_notify(self, session: Session) -> None:
        """Note that the kernel will give notice of the session's death."""
        self._fencer.expect_notice(session.id)
        await session.send(Done(), ())

    async def report(self, session: Session, request: Report) -> None:
        """Note an engine's role, and give it its orders."""
        self._fencer.beat(session.id)
        detail = printable(request.detail, self._limits)
        cohort = self.cohorts.joined(session.id)
        before = cohort.role if cohort is not None else request.role
        order, effects = self.cohorts.report(session.id, request.role, detail, time.monotonic())
        self._changed()
        if cohort is not None and before != request.role:
            facts = {"cohort": cohort.name, "before": before, "role": request.role, "detail": detail}
            self._observer.tell(Kind.ENGINE_ROLE_CHANGED, cohort.engine, **facts)
        self._fencer.apply(effects)
        await session.send(Orders(order), ())

    async def beat(self, session: Session, _: Beat) -> None:
        """Note that an engine makes progress."""
        self.cohorts.alive_or_departing(session.id)
        self._fencer.beat(session.id)
        await session.send(Done(), ())

    async def depart(self, session: Session, request: Depart) -> None:
        """Note that an engine ends by itself."""
        check_wait(request.grace_s, self._limits.wait_s)
        self._fencer.depart(session.id, request.grace_s)
        self._changed()
        await session.send(Done(), ())

    async def elect(self, session: Session, request: Elect, ended: asyncio.Event) -> None:
        """Grant a lock, once its owner is gone."""
        check_wait(request.timeout_s, self._limits.wait_s)
        claim = self.claim(session)
        seat = self._lock(request.lock)
        if seat.holder is not None and seat.holder.cohort == claim.cohort and self._are_of_one_process(seat.holder.session, session):
            seat.hand_on(session.id)  # asked again, or by the session that follows one which was given up
            self._changed()
            await session.send(Elected(request.lock, seat.number), ())
            return
        self._post(seat.claim(claim, first=self.goes_first(claim)))
        seated: Seated = await session.answer(
            f"lock {request.lock}", request.timeout_s, ended, lambda: self._post(seat.withdraw(session.id, request.timeout_s))
        )
        await session.send(Elected(request.lock, seated.number), ())

    def _are_of_one_process(self, known: SessionId, session: Session) -> bool:
        other = self._sessions.get(known)
        return known == session.id or (other is not None and session.is_of(other))

    async def await_role(self, session: Session, request: AwaitRole, ended: asyncio.Event) -> None:
        """Answer once the session's engine has a role."""
        check_wait(request.timeout_s, self._limits.wait_s)
        self._fencer.apply(self.cohorts.await_role(session.id, request.role))
        await session.answer(
            "its own engine", request.timeout_s, ended, lambda: self._fencer.apply(self.cohorts.withdraw(session.id, request.timeout_s))
        )
        await session.send(Done(), ())

    def instruct(self, request: Instruct) -> None:
        """Pass an operator's order on."""
        cohort = self.cohorts.by_name.get(request.cohort)
        if cohort is None:
            raise PoolNotFound(f"no engine here has the cohort {request.cohort!r}", hint="`gms failover status` lists those that there are.")
        cohort.order = request.order
        self._changed()
        self._observer.tell(Kind.ENGINE_ORDERED, cohort.engine, cohort=cohort.name, order=request.order)
        if request.order == "promote":
            for seat in self.locks.values():
                seat.prefer(cohort.name)

    def closed(self, session: Session) -> None:
        """A session's connection has ended."""
        for seat in self.locks.values():
            seat.drop(session.id)
        self._fencer.lost(session.id)
        self._changed()

    def close(self) -> None:
        """Watch no process any more."""
        self._fencer.close()

    def _lock(self, name: str) -> Seat:
        check_label(name, "a lock", self._limits)
        if name not in self.locks and len(self.locks) >= self._limits.pools:
            raise QuotaExceeded(f"{self._limits.pools} locks exist already")
        return self.locks.setdefault(name, Seat(f"lock {name!r}"))

    def _post(self, effects: Sequence[SeatEffect | RoleReached]) -> None:
        self._changed()
        for effect in effects:
            if effect.session in self._sessions:
                self._sessions[effect.session].answers.put_nowait(effect)
        for name, seat in self.locks.items():
            if seat.holder is not None and seat.number != self._terms.get(name, 0):
                self._terms[name] = seat.number
                owner = seat.holder
                self._observer.tell(Kind.LOCK_GRANTED, name, engine=owner.label, cohort=owner.cohort, term=seat.number)

    def _apply(self, effects: list[CohortEffect]) -> None:
        self._changed()
        for effect in effects:
            if isinstance(effect, Gone):
                now = time.monotonic()
                engine, reason, noticed_s, fenced = self._noticed.pop(effect.cohort, ("", "", now, False))
                self.ends.append(EndStatus(effect.cohort, engine, reason, noticed_s, now))
                self._observer.tell(Kind.ENGINE_GONE, engine, cohort=effect.cohort, seconds=round(now - noticed_s, 6), fenced=fenced)
                if fenced:
                    self._observer.fenced(now - noticed_s)
                self._gone(effect.cohort)
            elif isinstance(effect, Mute):
                self._mute(effect.cohort)
            elif not isinstance(effect, Kill):
                self._post([effect])

    def _ending(self, cohort: str, engine: str, reason: str) -> None:
        self._changed()
        known = self.cohorts.by_name.get(cohort)  # none, if its last process has exited
        self._noticed[cohort] = (engine, reason, time.monotonic(), known is None or known.state == "fencing")
        for seat in self.locks.values():
            self._post(seat.cohort_ends(cohort, reason))
        self._ending_elsewhere(cohort, reason)

    def _exited(self, session: SessionId) -> None:
        self._changed()
        # A lock needs no more than that its owner cannot act any more; what others of its cohort may still do is the business of the retained pools.
        for seat in self._owned(lambda claim: claim.session == session):
            self._post(seat.vacate())

    def _failed(self, cohort: str, error: GmsError, final: bool) -> None:
        for seat in self._owned(lambda claim: claim.cohort == cohort):
            self._post(seat.end(error.message))  # the owner's own process may exit all the same, and a lock needs no more
        self._failed_elsewhere(cohort, error, final)

    def _owned(self, by: Callable[[Claim], bool]) -> list[Seat]:
        return [seat for seat in self.locks.values() if seat.holder is not None and by(seat.holder)]

    def status(self) -> tuple[CohortStatus, ...]:
        """All cohorts as they are now."""
        return tuple(self._cohort_status(cohort) for cohort in self.cohorts.by_name.values())

    def lock_status(self) -> tuple[LockStatus, ...]:
        """All locks as they are now."""
        return tuple(
            LockStatus(name, seat.number, seat.holder.cohort if seat.holder else "", tuple(claim.cohort for claim in seat.queue))
            for name, seat in sorted(self.locks.items())
        )

    def _cohort_status(self, cohort: Cohort) -> CohortStatus:
        now = time.monotonic()
        living: dict[int, list[MemberStatus]] = {}
        for member in cohort.members.values():
            if not member.exited:
                living.setdefault(member.pid, []).append(MemberStatus(member.pid, member.process, now - member.since))
        return CohortStatus(
            name=cohort.name,
            engine=cohort.engine,
            state=cohort.state,
            role=cohort.role,
            role_age_s=now - cohort.role_since,
            detail=cohort.detail,
            reason=cohort.reason,
            order=cohort.order,
            age_s=now - cohort.since,
            silent_s=max((self._fencer.silent_s(session) for session in cohort.members), default=-1.0),
            members=tuple(same[0] for same in living.values()),
        )
