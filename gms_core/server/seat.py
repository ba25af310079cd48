"""A seat, as a pure state machine: one holder at a time, in order of arrival, each with a higher number than the one before.

The number is the fencing token: the term of a lock, the epoch of a retained pool. The seat does not know when a holder is really gone; whoever owns
it calls `vacate` once that is proven.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gms_core.errors import AcquireTimeout, CohortFenced, GmsError, LeaseConflict
from gms_core.server.effects import Refuse, SessionId, Wait


@dataclass(frozen=True)
class Claim:
    """Who asks for a seat, or has it.

    Attributes:
        cohort: Whose process the session is.
        label: What people call the engine.
        bridge: Whether it can begin with a part of what the seat is about, see `gms_core.server.retained`.
    """

    session: SessionId
    cohort: str
    label: str
    bridge: bool = False


@dataclass(frozen=True)
class Seated:
    """The session has the seat, under this number."""

    session: SessionId
    number: int


SeatEffect = Seated | Wait | Refuse


class Seat:
    """One exclusive right.

    Attributes:
        what: The right in words, for messages.
        number: Of the last grant.
        holder: Who has it; still set while it is not proven that the holder is gone.
        ending: Why the holder is about to be gone; empty while it lives.
        failure: What kept it from being gone in time, if anything: what whoever waits in vain is refused with.
        queue: Who has asked, in the order in which they will get it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.number = 0
        self.holder: Claim | None = None
        self.ending = ""
        self.failure: GmsError | None = None
        self.queue: list[Claim] = []
        self._told: dict[SessionId, str] = {}

    @property
    def record(self) -> tuple[int, Claim | None, str]:
        """Number, holder, and why that is ending: what the next server has to know. Who waits asks again."""
        return self.number, self.holder, self.ending

    def resume(self, number: int, holder: Claim | None, ending: str) -> None:
        """Take a seat over as `record` told it."""
        self.number, self.holder, self.ending = number, holder, ending

    def hand_on(self, session: SessionId) -> None:
        """The holder's process goes on with another session."""
        assert self.holder is not None
        self.holder = replace(self.holder, session=session)

    def claim(self, claim: Claim, *, first: bool = False) -> list[SeatEffect]:
        """Ask for the seat; the answer is among the effects, now or of a later call.

        Args:
            claim: Who asks.
            first: Whether it goes before all others.

        Raises:
            LeaseConflict: Its cohort has the seat, or has asked for it, already.
        """
        for known in (self.holder, *self.queue):
            if known is not None and known.cohort == claim.cohort:
                has = "has" if known is self.holder else "waits for"
                raise LeaseConflict(f"{claim.label} already {has} {self.what}")
        self.queue.insert(0 if first else len(self.queue), claim)
        return self._settle()

    def prefer(self, cohort: str) -> None:
        """Put a cohort's claim, if there is one, before all others."""
        self.queue.sort(key=lambda claim: claim.cohort != cohort)

    def withdraw(self, session: SessionId, waited_s: float) -> list[SeatEffect]:
        """Take a claim back because its time is over; nothing if it was answered meanwhile."""
        if all(claim.session != session for claim in self.queue):
            return []
        reason = self._told.get(session, "")
        self.drop(session)
        return [Refuse(session, self.failure or AcquireTimeout(f"{self.what} was not granted within {waited_s:g} s: {reason}"))]

    def drop(self, session: SessionId) -> None:
        """Forget a claim whose session has ended. A holder stays: that its session has ended proves nothing."""
        self.queue = [claim for claim in self.queue if claim.session != session]
        self._told.pop(session, None)

    def end(self, reason: str, failure: GmsError | None = None) -> list[SeatEffect]:
        """The holder is about to be gone, or should be."""
        self.ending, self.failure = reason, failure
        return self._settle()

    def cohort_ends(self, cohort: str, reason: str) -> list[SeatEffect]:
        """A cohort ends: what it has asked for it can never have, since its exits may be over already; what it has it keeps until `vacate`."""
        refused: list[SeatEffect] = [Refuse(claim.session, CohortFenced(reason)) for claim in self.queue if claim.cohort == cohort]
        for effect in refused:
            self.drop(effect.session)
        if self.holder is not None and self.holder.cohort == cohort:
            self.ending, self.failure = reason, None
        return [*refused, *self._settle()]

    def vacate(self) -> list[SeatEffect]:
        """It is proven that nothing of the holder is left, or it has given the seat back."""
        self.holder, self.ending, self.failure = None, "", None
        return self._settle()

    def refuse_all(self, error: GmsError) -> list[SeatEffect]:
        """Nobody who waits can get the seat."""
        refused: list[SeatEffect] = [Refuse(claim.session, error) for claim in self.queue]
        self.queue.clear()
        self._told.clear()
        return refused

    def _settle(self) -> list[SeatEffect]:
        effects: list[SeatEffect] = []
        if self.holder is None and self.queue:
            self.holder = self.queue.pop(0)
            self._told.pop(self.holder.session, None)
            self.number += 1
            effects.append(Seated(self.holder.session, self.number))
        if self.holder is not None:
            reason = self.ending or f"{self.holder.label} has it"
            for claim in self.queue:
                if self._told.get(claim.session) != reason:
                    self._told[claim.session] = reason
                    effects.append(Wait(claim.session, reason))
        return effects
