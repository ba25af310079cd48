"""What an engine is now: one thread-safe state that its gate, its status page, its reports to the server and its notifications look at."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from gms_core import __version__
from gms_core.errors import GmsError, NotPromoted
from gms_core.failover.roles import Event, next_role
from gms_core.protocol.messages import Role

log = logging.getLogger(__name__)

Fact = str | int | float


@dataclass(frozen=True, slots=True)
class Promoted:
    """What an engine has once its memory is mapped.

    Attributes:
        epochs: The granted epoch of each retained pool, by whatever names the pools apart, such as the rank.
        kv: Facts on the memory and on how long it took, for the status page; numbers in bytes and seconds.
    """

    epochs: Mapping[str, int] = field(default_factory=dict)
    kv: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoleChange:
    """An engine has another role than before.

    Attributes:
        role: From now on.
        previous: Until now.
        engine: What people call the engine.
        cohort: Its cohort.
        lock: What elects the primary, as it was configured.
        term: Of the election; 0 if it was not elected.
        epochs: Of its retained pools.
        address: Where it serves, such as ``127.0.0.1:8000``; empty if it is not known.
        detail: Why, in words.
        at: When, in seconds since 1970.
    """

    role: Role
    previous: Role
    engine: str
    cohort: str
    lock: str
    term: int
    epochs: Mapping[str, int]
    address: str
    detail: str
    at: float


class EngineStatus(msgspec.Struct, frozen=True):
    """The JSON of ``/gms/status``.

    Attributes:
        role: What the engine is.
        engine: What people call it.
        cohort: Its cohort.
        lock: What elects the primary.
        term: Of the election; 0 if this process does not know one.
        epochs: Of its retained pools; empty if this process does not know them.
        since_s: Seconds for which it has had that role.
        kv: Facts on the memory of the retained pools.
        detail: Why it has that role, or what it waits for.
        address: Where it serves, or will serve.
        entered: When it had which role first, in seconds since 1970.
        version: Of gms.
    """

    role: Role
    engine: str
    cohort: str
    lock: str
    term: int
    epochs: dict[str, int]
    since_s: float
    kv: dict[str, Fact]
    detail: str
    address: str
    entered: dict[str, float]
    version: str


class EngineState:
    """The role of this process's engine, and the facts around it. Safe to use from several threads.

    Attributes:
        engine: What people call the engine.
        cohort: Its cohort.
        lock: What elects the primary, as it was configured.
    """

    def __init__(self, engine: str, cohort: str, lock: str, *, address: str = "") -> None:
        self.engine = engine
        self.cohort = cohort
        self.lock = lock
        self._guard = threading.RLock()
        self._listeners: list[Callable[[RoleChange], None]] = []
        self._role: Role = "init"
        self._since = time.monotonic()
        self._entered: dict[str, float] = {"init": time.time()}
        self._term = 0
        self._promoted = Promoted()
        self._address = address
        self._detail = ""
        self._ended_by: GmsError | None = None

    @property
    def role(self) -> Role:
        """What the engine is."""
        return self._role

    @property
    def detail(self) -> str:
        """Why it has that role, or what it waits for."""
        return self._detail

    def reported(self) -> tuple[Role, str]:
        """Role and detail of one instant."""
        with self._guard:
            return self._role, self._detail

    @property
    def ended_by(self) -> GmsError | None:
        """The error that fenced it; None if it is not fenced, or was fenced without an error."""
        return self._ended_by

    def over(self) -> GmsError:
        """The error to raise to whoever waited for the engine to serve, now that it never will."""
        return self._ended_by or NotPromoted(f"{self.engine} was ended before it served: {self._detail or 'no reason was given'}")

    def listen(self, listener: Callable[[RoleChange], None]) -> None:
        """Call a function after each change of role, in the order of the changes and in the thread that made it. It must be quick and not raise."""
        with self._guard:
            self._listeners.append(listener)

    def note(self, detail: str) -> None:
        """Say what the engine waits for, in words. Its role stays; what is fenced keeps the reason for it."""
        with self._guard:
            if self._role != "fenced":
                self._detail = detail

    def serves_at(self, address: str) -> None:
        """Say where the engine serves, or will serve."""
        with self._guard:
            self._address = address

    def ready(self) -> None:
        """The engine has initialised: init becomes standby.

        Raises:
            RoleConflict: It was not init; for the other changes of role likewise.
        """
        self._change(Event.READY, "")

    def elected(self, term: int) -> None:
        """The engine has the lock: standby becomes promoting."""
        with self._guard:
            self._change(Event.ELECTED, f"elected, term {term}", term=term)

    def promoted(self, promoted: Promoted) -> None:
        """The engine has its memory: promoting becomes primary."""
        with self._guard:
            self._change(Event.PROMOTED, "", promoted=promoted)

    def add(self, **kv: Fact) -> None:
        """Add facts on the memory, such as those that are known only after the promotion."""
        with self._guard:
            self._promoted = Promoted(self._promoted.epochs, {**self._promoted.kv, **kv})

    def server_lost(self, error: GmsError) -> bool:
        """The connection to a device server has ended. Returns whether the engine goes on: a primary does, any other is fenced by it."""
        with self._guard:
            self._change(Event.SERVER_LOST, f"server lost: {error.message}", error)
            return self._role == "primary"

    def end(self, reason: str, error: GmsError | None = None) -> None:
        """The engine is to end: whatever it was becomes fenced. Nothing if it is fenced already."""
        self._change(Event.ENDED, reason, error)

    def _change(self, event: Event, detail: str, error: GmsError | None = None, *, term: int | None = None, promoted: Promoted | None = None) -> None:
        with self._guard:
            previous = self._role
            role = next_role(previous, event)
            if previous == "fenced":
                return
            self._detail = detail
            if role == previous:
                return
            self._role, self._since, self._entered[role] = role, time.monotonic(), time.time()
            self._term = self._term if term is None else term
            self._promoted = self._promoted if promoted is None else promoted
            if role == "fenced":
                self._ended_by = error
            change = self._described(previous)
            log.info("%s was %s and is %s now (%s)", self.engine, previous, role, detail or "in order", extra={"cohort": self.cohort, "role": role})
            for listener in self._listeners:
                listener(change)

    def _described(self, previous: Role) -> RoleChange:
        return RoleChange(
            role=self._role,
            previous=previous,
            engine=self.engine,
            cohort=self.cohort,
            lock=self.lock,
            term=self._term,
            epochs=dict(self._promoted.epochs),
            address=self._address,
            detail=self._detail,
            at=self._entered[self._role],
        )

    def snapshot(self) -> EngineStatus:
        """What the engine is at this instant."""
        with self._guard:
            return EngineStatus(
                role=self._role,
                engine=self.engine,
                cohort=self.cohort,
                lock=self.lock,
                term=self._term,
                epochs=dict(self._promoted.epochs),
                since_s=round(time.monotonic() - self._since, 3),
                kv=dict(self._promoted.kv),
                detail=self._detail,
                address=self._address,
                entered=dict(self._entered),
                version=__version__,
            )
