"""Engines as the servers of a node see them together: an engine with several devices has joined its cohort on the server of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from gms_core.errors import EngineNotFound, InvalidArgument
from gms_core.protocol.messages import CohortStatus, MemberStatus, Order, Role, StatusReport

_PROGRESS: dict[Role, int] = {role: index for index, role in enumerate(get_args(Role))}
"""An engine's role only ever moves on, so of two servers the one that says the later role has heard from it last."""
_STATES = ("alive", "departing", "fencing")


@dataclass(frozen=True, slots=True)
class Engine:
    """One instance of an engine.

    Attributes:
        name: What people call it.
        cohort: The random text that its processes share.
        role: As it last said itself.
        role_age_s: Seconds for which it has had that role.
        state: ``alive``, ``departing`` or ``fencing``.
        detail: Words to the role.
        reason: Why it is being ended; empty if it is not.
        order: What an operator wants of it, and it has not done yet.
        age_s: Seconds since its first process joined.
        silent_s: Seconds since the last beat of the process that has been silent for the longest; -1 if none has a deadline.
        members: Its living processes, each once.
        devices: Whose servers it has joined.
        epochs: Of the retained pools that it holds, by ``device/pool``.
    """

    name: str
    cohort: str
    role: Role
    role_age_s: float
    state: str
    detail: str
    reason: str
    order: Order
    age_s: float
    silent_s: float
    members: tuple[MemberStatus, ...]
    devices: tuple[str, ...]
    epochs: dict[str, int]

    @property
    def standing(self) -> Role:
        """Its role for others: an engine that is being ended is fenced, whatever it said last."""
        return "fenced" if self.state == "fencing" else self.role

    @property
    def epoch(self) -> int:
        """The highest of its epochs; 0 if it holds nothing."""
        return max(self.epochs.values(), default=0)


def engines(reports: Iterable[StatusReport]) -> list[Engine]:
    """All engines, by name, then by age."""
    seen: dict[str, list[tuple[str, CohortStatus]]] = {}
    epochs: dict[str, dict[str, int]] = {}
    for report in reports:
        for cohort in report.cohorts:
            seen.setdefault(cohort.name, []).append((report.device, cohort))
        for pool in report.retained:
            if pool.holder:
                epochs.setdefault(pool.holder, {})[f"{report.device}/{pool.name}"] = pool.epoch
    merged = [_merge(views, epochs.get(name, {})) for name, views in seen.items()]
    return sorted(merged, key=lambda engine: (engine.name, -engine.age_s))


def _merge(views: Sequence[tuple[str, CohortStatus]], epochs: dict[str, int]) -> Engine:
    cohorts = [cohort for _, cohort in views]
    told = max(cohorts, key=lambda cohort: (_PROGRESS[cohort.role], cohort.role_age_s))
    state = max(cohorts, key=lambda cohort: _STATES.index(cohort.state) if cohort.state in _STATES else 0)
    members = {member.pid: member for cohort in cohorts for member in cohort.members}
    return Engine(
        name=told.engine,
        cohort=told.name,
        role=told.role,
        role_age_s=told.role_age_s,
        state=state.state,
        detail=told.detail,
        reason=next((cohort.reason for cohort in cohorts if cohort.reason), ""),
        order=next((cohort.order for cohort in cohorts if cohort.order), ""),
        age_s=max(cohort.age_s for cohort in cohorts),
        silent_s=max(cohort.silent_s for cohort in cohorts),
        members=tuple(members.values()),
        devices=tuple(device for device, _ in views),
        epochs=epochs,
    )


def choose(found: Sequence[Engine], wanted: str | None, role: Role) -> Engine:
    """The engine that an operator means.

    Args:
        found: All that there are.
        wanted: Its name or its cohort; None for the only one that has the role.
        role: Which role the one has that need not be named.

    Raises:
        EngineNotFound: There is none.
        InvalidArgument: There are several.
    """
    if wanted is None:
        chosen = [engine for engine in found if engine.standing == role]
        what = f"no engine is {role}"
    else:
        # The name belongs to the living one; an instance that is being ended may have had it before.
        named = [engine for engine in found if wanted in (engine.cohort, engine.name)]
        chosen = [engine for engine in named if engine.state == "alive"] or named
        what = f"there is no engine {wanted!r}"
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        listing = ", ".join(f"{engine.name} ({engine.standing})" for engine in found)
        raise EngineNotFound(what, hint=f"The engines are: {listing}." if listing else "No engine has joined a server; is one starting?")
    listing = ", ".join(f"{engine.name} (cohort {engine.cohort})" for engine in chosen)
    which = f"{len(chosen)} engines are {role}" if wanted is None else f"{len(chosen)} engines are called {wanted!r}"
    raise InvalidArgument(f"{which}: {listing}", hint="Name one of them, by its cohort if the names are the same.")
