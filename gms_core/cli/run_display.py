"""How ``gms run`` shows what it does: a live table on a terminal, else a line for each change, as text or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import click

from gms_core.cli.options import age, count

if TYPE_CHECKING:
    from rich.live import Live

    from gms_core.fleet.view import Change, EngineRow

SCHEMA = "gms-run/1"
COLOURS = {"primary": "green", "standby": "cyan", "promoting": "yellow", "fenced": "red", "waiting": "red", "ending": "yellow"}


class Display(Protocol):
    """Where changes and states go."""

    def change(self, change: Change) -> None:
        """Show a change."""

    def tick(self, engines: Sequence[EngineRow]) -> None:
        """Show the state of all engines."""


@contextlib.contextmanager
def display(output: str) -> Iterator[Display]:
    """The display for an output format. It raises `OSError` where standard output cannot be written, but not any more when the context ends."""
    if output == "json":
        yield JsonLines()
    elif output == "lines" or not sys.stdout.isatty():
        yield Lines()
    else:
        yield from _table()


def _table() -> Iterator[Display]:
    from rich.live import Live

    from gms_core.cli.console import standard_output

    live = Live(console=standard_output(), auto_refresh=False, transient=False)
    live.start()
    try:
        yield LiveTable(live)
    finally:
        with contextlib.suppress(OSError):  # the terminal is closed
            live.stop()


class JsonLines:
    """One JSON object a line for each change."""

    def change(self, change: Change) -> None:
        """Print it."""
        fields: dict[str, object] = {"schema": SCHEMA, "time": time.time(), "subject": change.subject, "state": change.state, "detail": change.detail}
        if change.engine is not None:
            fields |= {"pid": change.engine.pid, "epoch": change.engine.epoch, "restarts": change.engine.restarts}
            fields |= {"starts_in_s": round(change.engine.starts_in_s, 3)}
        click.echo(json.dumps(fields))

    def tick(self, engines: Sequence[EngineRow]) -> None:
        """Nothing: changes are told one by one."""


class Lines:
    """One line of text for each change."""

    def change(self, change: Change) -> None:
        """Print it."""
        click.echo(f"{time.strftime('%X')} {as_line(change)}")

    def tick(self, engines: Sequence[EngineRow]) -> None:
        """Nothing: changes are told one by one."""


class LiveTable:
    """A table that is drawn again several times a second; what is no engine's state is printed above it."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def change(self, change: Change) -> None:
        """Print what the table has no place for."""
        if change.engine is None or change.state == "waiting":
            self._live.console.print(f"{time.strftime('%X')} {as_line(change)}", markup=False, highlight=False)

    def tick(self, engines: Sequence[EngineRow]) -> None:
        """Draw the table."""
        from rich.table import Table
        from rich.text import Text

        table = Table("engine", "role", "for", "process group", "epoch", "restarts", "", box=None, pad_edge=True)
        for engine in engines:
            table.add_row(
                engine.name,
                Text(engine.state, style=COLOURS.get(engine.state, "")),
                age(engine.state_age_s),
                str(engine.pid or "-"),
                str(engine.epoch or "-"),
                str(engine.restarts),
                f"starts in {engine.starts_in_s:.0f} s; {engine.detail}" if engine.starts_in_s else engine.detail,
            )
        self._live.update(table, refresh=True)


def as_line(change: Change) -> str:
    """A change in words."""
    engine = change.engine
    facts = []
    if engine is not None:
        facts += [f"process group {engine.pid}"] if engine.pid else []
        facts += [f"epoch {engine.epoch}"] if engine.epoch else []
        facts += [count(engine.restarts, "restart")] if engine.restarts else []
        facts += [f"starts in {engine.starts_in_s:.0f} s"] if engine.starts_in_s else []
    facts += [change.detail] if change.detail else []
    return f"{change.subject} {change.state}" + (f" ({'; '.join(facts)})" if facts else "")
