"""Tables of engines, locks and retained pools, for the commands that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gms_core.cli.options import age, format_size

if TYPE_CHECKING:
    from gms_core.fleet.engines import Engine
    from gms_core.protocol.messages import StatusReport

COLOURS = {"primary": "green", "standby": "cyan", "promoting": "yellow", "fenced": "red"}


def engine_table(found: Sequence[Engine]) -> Table:
    """A line for each engine."""
    table = Table("engine", "role", "for", "epoch", "processes", "state", "cohort", "", box=None, pad_edge=True)
    for engine in found:
        table.add_row(
            engine.name,
            Text(engine.standing, style=COLOURS.get(engine.standing, "")),
            age(engine.role_age_s),
            str(engine.epoch or "-"),
            ", ".join(f"{member.process} {member.pid}" for member in engine.members) or "-",
            engine.state,
            engine.cohort,
            words(engine),
        )
    return table


def words(engine: Engine) -> str:
    """What there is to say about an engine besides its role."""
    silent = f"silent for {age(engine.silent_s)}" if engine.silent_s >= 1 else ""
    told = f"told to {engine.order}" if engine.order else ""
    return "; ".join(part for part in (engine.reason, engine.detail, told, silent) if part)


def lock_table(reports: Iterable[StatusReport], found: Sequence[Engine]) -> Table | None:
    """A line for each lock that a server arbitrates; None if there is none."""
    names = _names(found)
    rows = [
        (status.name, report.device, str(status.term), names(status.owner) or "-", ", ".join(map(names, status.waiting)) or "-")
        for report in reports
        for status in report.locks
    ]
    return _table(("lock", "device", "term", "owner", "waiting"), rows)


def retained_table(reports: Iterable[StatusReport], found: Sequence[Engine]) -> Table | None:
    """A line for each retained pool; None if there is none."""
    names = _names(found)
    rows = [
        (pool.name, report.device, pool.state, str(pool.epoch or "-"), format_size(pool.bytes), names(pool.holder) or "-", str(len(pool.users)))
        for report in reports
        for pool in report.retained
    ]
    return _table(("retained pool", "device", "state", "epoch", "size", "holder", "users"), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | None:
    if not rows:
        return None
    table = Table(*headings, box=None, pad_edge=True)
    for row in rows:
        table.add_row(*row)
    return table


def _names(found: Sequence[Engine]) -> Callable[[str], str]:
    """Gives the engine's name for a cohort, or the cohort where no such engine is known."""
    by_cohort = {engine.cohort: engine.name for engine in found}
    return lambda cohort: by_cohort.get(cohort, cohort)
