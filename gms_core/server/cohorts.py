"""The processes of the engines, as a pure state machine: who belongs to which cohort, and when a cohort is being ended, and is gone.

The processes of a cohort fail together. When one of them dies, loses its connection, or is silent for too long, the rest is killed; the cohort is
gone once the kernel has reported the exit of every one of them. Only then has nothing of it work in flight on a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from gms_core.errors import AcquireTimeout, CohortFenced, LeaseConflict
from gms_core.protocol.messages import Order, Role
from gms_core.server.effects import Refuse, SessionId, Wait
from gms_core.server.records import CohortRecord, CohortState, MemberRecord

REMEMBERED = 1024
"""Names of cohorts that are gone and may not be joined again: a process that starts late must not revive its engine."""


@dataclass(frozen=True)
class Kill:
    """End the processes of these members; none if all of them have exited already."""

    cohort: str
    engine: str
    members: tuple[SessionId, ...]
    reason: str


@dataclass(frozen=True)
class Mute:
    """The cohort is ending, and every process of it that served has exited: nobody hears of it any more."""

    cohort: str


@dataclass(frozen=True)
class Gone:
    """Every process of the cohort has exited."""

    cohort: str


@dataclass(frozen=True)
class RoleReached:
    """The role that the session waits for is the cohort's role now."""

    session: SessionId


CohortEffect = Kill | Mute | Gone | RoleReached | Refuse | Wait


@dataclass
class Member:
    """One joined session and its process. A process that joins with two sessions is two members: each has a pidfd of its own.

    Attributes:
        serves: Whether it accepts and answers requests.
        exited: Whether the kernel has reported its exit.
        deadline_s: Seconds without a sign of progress after which its cohort is ended; 0 for no such watch.
        started: When its process was started, in ticks of the kernel; 0 if that is not known.
    """

    session: SessionId
    pid: int
    process: str
    since: float
    serves: bool = False
    exited: bool = False
    deadline_s: float = 0.0
    started: int = 0


@dataclass
class Cohort:
    """All processes of one instance of an engine.

    Attributes:
        reason: Why it is being ended.
        ends_by: When its orderly end is to be over, on the monotonic clock.
        awaiting: Sessions that wait until it has a role, and which.
    """

    name: str
    engine: str
    since: float
    state: CohortState = "alive"
    role: Role = "init"
    role_since: float = 0.0
    detail: str = ""
    reason: str = ""
    order: Order = ""
    ends_by: float = 0.0
    members: dict[SessionId, Member] = field(default_factory=dict)
    awaiting: dict[SessionId, Role] = field(default_factory=dict)

    def record(self) -> CohortRecord:
        """What the next server has to know."""
        members = tuple(
            MemberRecord(member.session, member.pid, member.process, member.since, member.serves, member.exited, member.deadline_s, member.started)
            for member in self.members.values()
        )
        return CohortRecord(
            self.engine, self.since, self.state, self.role, self.role_since, self.detail, self.reason, self.order, self.ends_by, members
        )


class Cohorts:
    """All cohorts of one server."""

    def __init__(self) -> None:
        self.by_name: dict[str, Cohort] = {}
        self._of_session: dict[SessionId, Cohort] = {}
        self._ended: deque[str] = deque(maxlen=REMEMBERED)

    def records(self) -> dict[str, CohortRecord]:
        """What the next server has to know, by name. Who waits for a role asks again."""
        return {name: cohort.record() for name, cohort in self.by_name.items()}

    @property
    def ended(self) -> tuple[str, ...]:
        """Names that may not be joined any more, the oldest first."""
        return tuple(self._ended)

    def resume(self, records: Mapping[str, CohortRecord], ended: Iterable[str], sessions: Container[SessionId]) -> None:
        """Take cohorts over from the server before.

        Args:
            records: As `records` told them.
            ended: Names that may not be joined any more.
            sessions: Those that may come back.
        """
        self._ended.extend(ended)
        for name, record in records.items():
            cohort = self.by_name[name] = Cohort(
                name,
                record.engine,
                record.since,
                record.state,
                record.role,
                record.role_since,
                record.detail,
                record.reason,
                record.order,
                record.ends_by,
            )
            for member in record.members:
                cohort.members[member.session] = Member(
                    member.session, member.pid, member.process, member.since, member.serves, member.exited, member.deadline_s, member.started
                )
                if member.session in sessions:
                    self._of_session[member.session] = cohort

    def forget(self, session: SessionId) -> None:
        """A session that was taken over will not come back, but its process has joined with another one: it is no member any more."""
        cohort = self._of_session.pop(session, None)
        if cohort is not None:
            cohort.awaiting.pop(session, None)
            del cohort.members[session]

    def joined(self, session: SessionId) -> Cohort | None:
        """The cohort that a session has joined, whatever its state is."""
        return self._of_session.get(session)

    def join(self, name: str, engine: str, member: Member) -> None:
        """Add a process.

        Raises:
            CohortFenced: The cohort is being ended, or has ended.
            LeaseConflict: The session has joined a cohort already.
        """
        if member.session in self._of_session:
            raise LeaseConflict("this session has joined a cohort already")
        cohort = self.by_name.get(name)
        if name in self._ended or (cohort is not None and cohort.state != "alive"):
            reason = cohort.reason or "it ends in an orderly way" if cohort else "it has ended"
            raise CohortFenced(
                f"cohort {name} of {engine} cannot be joined: {reason}", hint="Start the engine again; a new instance is a new cohort."
            )
        if cohort is None:
            cohort = self.by_name[name] = Cohort(name, engine, since=member.since, role_since=member.since)
        cohort.members[member.session] = member
        self._of_session[member.session] = cohort

    def alive(self, session: SessionId) -> Cohort:
        """The cohort that the session has joined, which may ask for what outlives a request.

        Raises:
            LeaseConflict: It has joined none.
            CohortFenced: It is being ended, or ends by itself.
        """
        cohort = self.alive_or_departing(session)
        if cohort.state != "alive":
            raise CohortFenced(f"{cohort.engine} is ending in an orderly way")
        return cohort

    def alive_or_departing(self, session: SessionId) -> Cohort:
        """The cohort that the session has joined.

        Raises:
            LeaseConflict: It has joined none.
            CohortFenced: It is being ended.
        """
        cohort = self._of_session.get(session)
        if cohort is None:
            raise LeaseConflict("this session's process has joined no cohort", hint="Join one first: whoever holds memory must be known to be gone.")
        if cohort.state == "fencing":
            raise CohortFenced(f"{cohort.engine} is being ended: {cohort.reason}")
        return cohort

    def report(self, session: SessionId, role: Role, detail: str, now: float) -> tuple[Order, list[CohortEffect]]:
        """Note the engine's role; returns what an operator wants of it, and who was waiting for that role."""
        cohort = self.alive_or_departing(session)
        if role != cohort.role:
            cohort.role, cohort.role_since = role, now
            if (cohort.order, role) in (("promote", "primary"), ("demote", "fenced")):
                cohort.order = ""
        cohort.detail = detail
        reached = [waiting for waiting, wanted in cohort.awaiting.items() if wanted == role]
        for waiting in reached:
            del cohort.awaiting[waiting]
        return cohort.order, [RoleReached(waiting) for waiting in reached]

    def await_role(self, session: SessionId, role: Role) -> list[CohortEffect]:
        """Wait until the session's cohort has this role."""
        cohort = self.alive_or_departing(session)
        if cohort.role == role:
            return [RoleReached(session)]
        cohort.awaiting[session] = role
        return [Wait(session, f"{cohort.engine} is {cohort.role}, not yet {role}")]

    def withdraw(self, session: SessionId, waited_s: float) -> list[CohortEffect]:
        """The time of a session that waits for a role is over; nothing if it was answered meanwhile."""
        cohort = self._of_session.get(session)
        if cohort is None or session not in cohort.awaiting:
            return []
        wanted = cohort.awaiting.pop(session)
        return [Refuse(session, AcquireTimeout(f"{cohort.engine} is still {cohort.role}, not {wanted}, after {waited_s:g} s"))]

    def depart(self, session: SessionId) -> Cohort:
        """The session's cohort ends in an orderly way from now on; that it loses connections and processes is no fault any more."""
        cohort = self.alive_or_departing(session)
        cohort.state = "departing"
        return cohort

    def lost(self, session: SessionId) -> list[CohortEffect]:
        """A session has ended. A process that has closed its connection may still compute: no proof, but a reason to end it."""
        cohort = self._of_session.pop(session, None)
        if cohort is None:
            return []
        cohort.awaiting.pop(session, None)
        member = cohort.members[session]
        if cohort.state != "alive":
            return []
        return self.fence(cohort.name, f"the connection of its {member.process} (pid {member.pid}) has ended")

    def dying(self, cohort_name: str, session: SessionId) -> list[CohortEffect]:
        """The kernel has given notice of a member's death, some time before its exit."""
        cohort = self.by_name.get(cohort_name)
        if cohort is None or cohort.state != "alive":
            return []
        member = cohort.members[session]
        return self.fence(cohort.name, f"its {member.process} (pid {member.pid}) is dying")

    def exited(self, cohort_name: str, session: SessionId) -> list[CohortEffect]:
        """The kernel has reported the exit of a member's process."""
        cohort = self.by_name[cohort_name]
        member = cohort.members[session]
        member.exited = True
        effects: list[CohortEffect] = []
        if cohort.state == "alive":
            effects += self.fence(cohort.name, f"its {member.process} (pid {member.pid}) has died")
        if member.serves and all(other.exited for other in cohort.members.values() if other.serves):
            effects.append(Mute(cohort.name))
        if all(other.exited for other in cohort.members.values()):
            effects += [Refuse(waiting, CohortFenced(f"{cohort.engine} has ended")) for waiting in cohort.awaiting]
            del self.by_name[cohort.name]
            for other in cohort.members:
                self._of_session.pop(other, None)
            self._ended.append(cohort.name)
            effects.append(Gone(cohort.name))
        return effects

    def fence(self, name: str, reason: str) -> list[CohortEffect]:
        """End a cohort. Nothing if that is being done already, or has been."""
        cohort = self.by_name.get(name)
        if cohort is None or cohort.state == "fencing":
            return []
        cohort.state, cohort.reason = "fencing", reason
        refused: list[CohortEffect] = [Refuse(waiting, CohortFenced(f"{cohort.engine} is being ended: {reason}")) for waiting in cohort.awaiting]
        cohort.awaiting.clear()
        living = tuple(member.session for member in cohort.members.values() if not member.exited)
        return [Kill(name, cohort.engine, living, reason), *refused]
