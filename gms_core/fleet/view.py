"""What people see of a fleet: the state of each engine, and a notice of each change. That nobody can see it is no reason to end engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine.

    Attributes:
        name: Such as ``engine-0``.
        state: A role, or ``starting`` (it has joined no server yet), ``ending``, or ``waiting`` (it is to be started).
        state_age_s: Seconds for which it has been so.
        pid: Of its first process, whose number is its process group's too; 0 if it does not run.
        epoch: Of the KV memory that it holds; 0 if it holds none.
        restarts: How often it was started again.
        detail: Why.
        starts_in_s: Seconds until it may be started, when it waits.
    """

    name: str
    state: str
    state_age_s: float
    pid: int
    epoch: int
    restarts: int
    detail: str
    starts_in_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """Something has changed.

    Attributes:
        subject: An engine's name, ``server``, ``restore`` or ``run``.
        state: What it is now. A server is ``starting``, ``up``, ``lost`` (it does not answer) or ``ended``; a restore is ``starting``, ``done`` or
            ``failed``; a run is ``ending``.
        detail: Why.
        engine: All of it, if it is an engine.
    """

    subject: str
    state: str
    detail: str = ""
    engine: EngineRow | None = None


class FleetView:
    """Remembers what was shown. Once a terminal is closed, a disk full or a reader gone, it is silent.

    Args:
        on_change: Called with each change.
        on_tick: Called with the state of all engines, each time that they are looked at.
    """

    def __init__(self, on_change: Callable[[Change], None], on_tick: Callable[[list[EngineRow]], None]) -> None:
        self._on_change = on_change
        self._on_tick = on_tick
        self._silent = False
        self._shown: dict[str, tuple[float, EngineRow]] = {}

    def tell(self, change: Change) -> None:
        """Tell of a change."""
        if not self._silent:
            try:
                self._on_change(change)
            except OSError:
                self._silent = True

    def show(self, states: Iterable[EngineRow]) -> None:
        """Show engines as they are now."""
        now = time.monotonic()
        current = []
        for state in states:
            since, before = self._shown.get(state.name, (now, None))
            if before is None or before.state != state.state:
                since = now
            if before is None or _facts(before) != _facts(state):
                self.tell(Change(state.name, state.state, state.detail, state))
            self._shown[state.name] = since, state
            current.append(replace(state, state_age_s=state.state_age_s or now - since))
        if not self._silent:
            try:
                self._on_tick(current)
            except OSError:
                self._silent = True


def _facts(state: EngineRow) -> tuple[object, ...]:
    return state.state, state.pid, state.epoch, state.detail
