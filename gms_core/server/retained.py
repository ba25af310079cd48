"""A retained pool as a pure state machine: who plans it, who uses it, who holds it, and that its memory outlives all of them.

One session plans: it says how large the memory is. Every later one adopts the plan, and may be a holder once the one before it is gone. What makes a
holder gone is not known here: the server calls `cohort_gone` when every process of a cohort has exited.

The bridge: a part of the memory, the front, exists twice. While it is not yet proven that a holder is gone, but certain that it cannot answer anybody
any more (`cohort_mute`), the next one may hold the other front, which the one before never had; the rest follows with the proof. So the two fronts
take turns, and a front is given to nobody while a process may live that was given it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from gms_core.errors import AcquireTimeout, CohortFenced, GmsError, IdentityMismatch, LeaseConflict
from gms_core.layout import Allocation, Identity
from gms_core.server.effects import Free, Refuse, SessionId, Wait
from gms_core.server.records import HolderState, RetainedRecord
from gms_core.server.seat import Claim, Seat, Seated, SeatEffect


@dataclass(frozen=True)
class Adopt:
    """The session uses the pool as it was planned."""

    session: SessionId


@dataclass(frozen=True)
class MakePlan:
    """The session has to say how large the pool is."""

    session: SessionId


@dataclass(frozen=True)
class GrantHold:
    """The session holds the memory.

    Attributes:
        epoch: The number of this grant.
        turn: Which front it has, as in `RetainedPool`.
        whole: Whether it has all of the memory; else that front alone, until `Whole`.
    """

    session: SessionId
    epoch: int
    turn: int
    whole: bool


@dataclass(frozen=True)
class Whole:
    """It is proven that nobody but the holder can touch the rest of the memory: the session may map it."""

    session: SessionId


RetainedEffect = Adopt | MakePlan | GrantHold | Whole | Wait | Refuse | Free


@dataclass(frozen=True)
class Asking:
    """A session that waits for the plan."""

    claim: Claim
    identity: Identity


class RetainedPool:
    """The state of one retained pool.

    Attributes:
        identity: What the memory is laid out for; None while there is none.
        plan: As it was provided.
        allocations: In arena order.
        users: Sessions that have adopted the plan or provided it.
        planner: The session that makes the plan.
        seat: Who holds the memory; its number is the epoch.
        spares: The second front: allocations for the same offsets as some of ``allocations``. Empty: there is no bridge.
        turn: Which front the holder has, or the last one had: 0 for the one among ``allocations``, 1 for ``spares``.
        holder_state: What is known of the holder: it may answer clients, it cannot but may compute, or nothing of it is left.
        unproven: Who held the memory before the holder, if its cohort may have a process left.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity: Identity | None = None
        self.plan = b""
        self.allocations: tuple[Allocation, ...] = ()
        self.users: dict[SessionId, Claim] = {}
        self.planner: Asking | None = None
        self.asking: list[Asking] = []
        self.seat = Seat(f"pool {name!r}")
        self.spares: tuple[Allocation, ...] = ()
        self.turn = 0
        self.holder_state: HolderState = "alive"
        self.unproven: Claim | None = None
        self._awaiting: SessionId | None = None

    def ask_plan(self, claim: Claim, identity: Identity) -> list[RetainedEffect]:
        """Ask for the plan; the answer is among the effects, now or of a later call.

        Raises:
            LeaseConflict: The session uses the pool, or has asked, already.
        """
        if claim.session in self.users or any(asking.claim.session == claim.session for asking in (*self.asking, *self._planning())):
            raise LeaseConflict(f"this session already uses, or waits for, pool {self.name!r}")
        self.asking.append(Asking(claim, identity))
        return self._settle()

    def withdraw(self, session: SessionId, waited_s: float) -> list[RetainedEffect]:
        """The time of a session that waits for the plan or for the hold is over; nothing if it was answered meanwhile."""
        if any(asking.claim.session == session for asking in self.asking):
            self.asking = [asking for asking in self.asking if asking.claim.session != session]
            return [Refuse(session, AcquireTimeout(f"nobody planned pool {self.name!r} within {waited_s:g} s"))]
        if self._awaiting == session:
            self._awaiting = None
            return [Refuse(session, AcquireTimeout(f"the end of the last holder of pool {self.name!r} is not proven after {waited_s:g} s"))]
        return self._of_seat(self.seat.withdraw(session, waited_s))

    def check_provide(self, session: SessionId) -> None:
        """Raise unless this session has to make the plan.

        Raises:
            LeaseConflict: It has not.
        """
        if self.planner is None or self.planner.claim.session != session:
            raise LeaseConflict(f"this session does not plan pool {self.name!r}")

    def provide(self, session: SessionId, plan: bytes, allocations: Sequence[Allocation], spares: Sequence[Allocation] = ()) -> list[RetainedEffect]:
        """The plan is made and its memory is there: whoever waited adopts it.

        Args:
            session: Who made the plan.
            plan: What the others adopt.
            allocations: In arena order.
            spares: A second one for each of some of the allocations, at the same offset and of the same size.

        Raises:
            LeaseConflict: The session does not plan this pool, or no longer.
        """
        self.check_provide(session)
        assert self.planner is not None
        self.identity, self.plan, self.allocations = self.planner.identity, plan, tuple(allocations)
        self.spares, self.turn = tuple(spares), 0
        self.users[session] = self.planner.claim
        self.planner = None
        return [Adopt(session), *self._settle()]

    def hold(self, session: SessionId, *, first: bool, bridge: bool = False) -> list[RetainedEffect]:
        """Ask to be the holder.

        Args:
            session: Who asks.
            first: Whether it goes before all others.
            bridge: Whether it can begin with a front alone.

        Raises:
            LeaseConflict: The session does not use the pool, or its cohort holds it, or has asked, already.
        """
        if session not in self.users:
            raise LeaseConflict(f"this session does not use pool {self.name!r}", hint="Ask for its plan first.")
        effects = self._of_seat(self.seat.claim(replace(self.users[session], bridge=bridge), first=first))
        return [*effects, *self._pass_on()]

    def prefer(self, cohort: str) -> list[RetainedEffect]:
        """Put a cohort's claim, if there is one, before all others."""
        self.seat.prefer(cohort)
        return self._pass_on()

    def await_whole(self, session: SessionId) -> list[RetainedEffect]:
        """The holder asks to be told when it may map all of the memory.

        Raises:
            LeaseConflict: The session does not hold the pool.
        """
        if self.seat.holder is None or self.seat.holder.session != session:
            raise LeaseConflict(f"this session does not hold pool {self.name!r}")
        if self.unproven is None:
            return [Whole(session)]
        self._awaiting = session
        return [Wait(session, f"processes of {self.unproven.label} are still ending")]

    def release(self, session: SessionId) -> list[RetainedEffect]:
        """A living session gives up whatever it has here; it has unmapped the memory."""
        effects = self.session_ended(session)
        if self.seat.holder is not None and self.seat.holder.session == session:
            effects += self._holder_is_gone()
        return [*effects, *self._settle()]

    def session_ended(self, session: SessionId) -> list[RetainedEffect]:
        """A session has ended: its use and its requests end, but not its hold."""
        self.users.pop(session, None)
        self.asking = [asking for asking in self.asking if asking.claim.session != session]
        self.seat.drop(session)
        if self._awaiting == session:
            self._awaiting = None
        if self.planner is not None and self.planner.claim.session == session:
            self.planner = None
        return [*self._pass_on(), *self._settle()]

    def cohort_ends(self, cohort: str, reason: str) -> list[RetainedEffect]:
        """A cohort is being ended, or ends by itself: what it has asked for it can never have, what it holds it keeps until it is gone."""
        effects = self._of_seat(self.seat.cohort_ends(cohort, reason))
        effects += [Refuse(asking.claim.session, CohortFenced(reason)) for asking in self.asking if asking.claim.cohort == cohort]
        self.asking = [asking for asking in self.asking if asking.claim.cohort != cohort]
        if self.planner is not None and self.planner.claim.cohort == cohort:
            self.planner = None
        if self._holds(cohort) and self._awaiting is not None:
            effects.append(Refuse(self._awaiting, CohortFenced(reason)))
            self._awaiting = None
        return [*effects, *self._pass_on(), *self._settle()]

    def cohort_mute(self, cohort: str) -> list[RetainedEffect]:
        """A cohort that is being ended has no process left that could answer or accept anything; others may still compute."""
        if not self._holds(cohort) or self.holder_state == "gone":
            return []
        self.holder_state = "mute"
        return self._pass_on()

    def cohort_gone(self, cohort: str) -> list[RetainedEffect]:
        """Every process of a cohort has exited."""
        if self._holds(cohort):
            return [*self._holder_is_gone(), *self._settle()]
        if not self._is_unproven(cohort):
            return []
        self.unproven = None
        effects = [*self._pass_on(), *self._settle()]
        if self._awaiting is not None:
            effects.append(Whole(self._awaiting))
            self._awaiting = None
        return effects

    def fence_failed(self, cohort: str, error: GmsError, *, final: bool) -> list[RetainedEffect]:
        """A cohort that holds or held the memory has not been ended.

        Args:
            cohort: Which.
            error: Why.
            final: Whether it cannot be: whoever waits for that is refused. Else they wait on: were they refused, a process that is slow to exit
                would use up one engine after the other.
        """
        effects: list[RetainedEffect] = []
        if self._is_unproven(cohort) and self._awaiting is not None:
            effects.append(Refuse(self._awaiting, error) if final else Wait(self._awaiting, error.message))
            self._awaiting = None if final else self._awaiting
        if self._holds(cohort) or (self._is_unproven(cohort) and self.holder_state == "gone"):
            effects += self._of_seat(self.seat.refuse_all(error) if final else self.seat.end(error.message, error))
        return effects

    def record(self) -> RetainedRecord:
        """What the next server has to know, apart from who uses the pool."""
        planner = self.planner
        return RetainedRecord(
            self.seat.record,
            self.identity,
            self.plan,
            self.allocations,
            self.spares,
            self.turn,
            self.holder_state,
            self.unproven,
            planner.claim if planner else None,
            planner.identity if planner else None,
        )

    @classmethod
    def of(cls, name: str, record: RetainedRecord, *, with_memory: bool) -> Self:
        """The pool of a record; without its memory, the number of the last epoch alone, so that no epoch comes twice."""
        pool = cls(name)
        number, holder, ending = record.seat
        if not with_memory:
            pool.seat.resume(number, None, "")
            return pool
        pool.seat.resume(number, holder, ending)
        pool.identity, pool.plan = record.identity, record.plan
        pool.allocations, pool.spares, pool.turn = record.allocations, record.spares, record.turn
        pool.holder_state, pool.unproven = record.holder_state, record.unproven
        if record.planner is not None and record.planned_identity is not None:
            pool.planner = Asking(record.planner, record.planned_identity)
        return pool

    def resume_user(self, claim: Claim) -> None:
        """A session that may come back has the plan."""
        if self.identity is not None:
            self.users[claim.session] = claim

    def _holds(self, cohort: str) -> bool:
        return self.seat.holder is not None and self.seat.holder.cohort == cohort

    def _is_unproven(self, cohort: str) -> bool:
        return self.unproven is not None and self.unproven.cohort == cohort

    def _of_seat(self, effects: list[SeatEffect]) -> list[RetainedEffect]:
        """Effects of the seat, with what else a grant says: it may have changed by the time at which the holder is told."""
        whole = self.unproven is None
        return [GrantHold(one.session, one.number, self.turn, whole) if isinstance(one, Seated) else one for one in effects]

    def _holder_is_gone(self) -> list[RetainedEffect]:
        self.holder_state = "gone"
        if self.unproven is None:
            return self._pass_on()
        return self._of_seat(self.seat.end(f"processes of {self.unproven.label} are still ending"))

    def _pass_on(self) -> list[RetainedEffect]:
        """Give the seat to the next, if that is safe: with all of the memory, or with the front that nobody who may live was ever given."""
        holder = self.seat.holder
        if holder is None or self.unproven is not None:
            return []
        queue = self.seat.queue
        if self.holder_state == "mute" and self.spares and queue and queue[0].bridge:
            self.unproven, self.turn = holder, 1 - self.turn
        elif self.holder_state != "gone":
            return []
        self.holder_state = "alive"
        return self._of_seat(self.seat.vacate())

    def drop(self) -> list[RetainedEffect]:
        """Free the memory and forget the plan.

        Raises:
            LeaseConflict: Somebody uses or holds it.
        """
        if self.users or self.seat.holder is not None or self.planner is not None:
            raise LeaseConflict(f"pool {self.name!r} is in use", hint="Stop the engines that use it first; `gms status` lists them.")
        return self._forget()

    def allocations_of(self, session: SessionId) -> dict[int, int]:
        """Bytes by id, in arena order.

        Raises:
            LeaseConflict: The session does not use the pool.
        """
        if session not in self.users:
            raise LeaseConflict(f"this session does not use pool {self.name!r}")
        return {allocation.id: allocation.size for allocation in (*self.allocations, *self.spares)}

    @property
    def state(self) -> str:
        """In one word, for status."""
        if self.seat.holder is not None:
            return "fencing" if self.seat.ending else "held"
        if self.planner is not None:
            return "planning"
        return "empty" if self.identity is None else "free"

    @property
    def idle(self) -> bool:
        """Whether nothing is lost when the pool is forgotten."""
        return self.identity is None and not self.users and not self.asking and self.planner is None and self.seat.number == 0

    def _planning(self) -> tuple[Asking, ...]:
        return () if self.planner is None else (self.planner,)

    def _forget(self) -> list[RetainedEffect]:
        ids = tuple(allocation.id for allocation in (*self.allocations, *self.spares))
        self.identity, self.plan, self.allocations, self.spares = None, b"", (), ()
        return [Free(ids)] if ids else []

    def _settle(self) -> list[RetainedEffect]:
        effects: list[RetainedEffect] = []
        waiting: list[Asking] = []
        for asking in self.asking:
            session = asking.claim.session
            if self.planner is not None:
                # Two engines whose ranks have the same devices in another order would wait for each other.
                if differences := asking.identity.differences(self.planner.identity):
                    effects.append(Refuse(session, self._mismatch(differences, f"is being planned by {self.planner.claim.label} for")))
                    continue
                waiting.append(asking)
                effects.append(Wait(session, f"{self.planner.claim.label} is planning it"))
                continue
            differences = asking.identity.differences(self.identity) if self.identity is not None else {}
            if differences and (self.users or self.seat.holder is not None):
                effects.append(Refuse(session, self._mismatch(differences, "is laid out for")))
            elif self.identity is None or differences:
                effects += self._forget()  # memory of another layout that nobody uses any more
                self.planner = asking
                effects.append(MakePlan(session))
            else:
                self.users[session] = asking.claim
                effects.append(Adopt(session))
        self.asking = waiting
        return effects

    def _mismatch(self, differences: dict[str, str], what: str) -> IdentityMismatch:
        listing = "; ".join(f"{name}: {pair}" for name, pair in differences.items())
        return IdentityMismatch(
            f"pool {self.name!r} {what} an engine of another kind: {listing} (expected != planned)",
            hint="Start all engines that stand in for one another with the same options, or give this one another kv_tag.",
            details=differences,
        )
