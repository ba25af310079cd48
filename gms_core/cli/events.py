"""``gms events``: what has happened at the servers, and what happens."""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.options import output_option, runtime_dir_option
from gms_core.cli.refusal import as_text
from gms_core.errors import GmsError, ServerUnavailable

if TYPE_CHECKING:
    from gms_core.fleet.event_reader import Cursor, Told

SCHEMA = "gms-events/1"
CLIENT = "gms events"
RECENT = 10
"""Events of the past that are shown before those that come, as `tail -f` does."""
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Moment(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click only
    """A moment of the past, as seconds since 1970."""

    name = "moment"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse what the user wrote."""
        if isinstance(value, float):
            return value
        text = str(value)
        if (span := _SPAN.fullmatch(text)) is not None:
            return time.time() - float(span[1]) * _SECONDS[span[2]]
        try:
            return dt.datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is neither a span such as 90s, 10m, 2h or 1d, nor a time such as 2026-01-31T12:00:00", param, ctx)


@click.command(short_help="Show what has happened at the servers.")
@click.option(
    "--device", "devices", multiple=True, metavar="UUID|host", help="Only this device. Can be given several times.  [default: all that have a socket]"
)
@runtime_dir_option
@output_option("table", "json")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--last", type=click.IntRange(min=0), metavar="N", help=f"Only the last N.  [default: all that are kept; with --follow: {RECENT}]")
@click.option("--since", type=Moment(), metavar="SPAN|TIME", help="Only what is not older, such as 10m, 2h or 2026-01-31T12:00:00.")
def events(devices: tuple[str, ...], runtime_dir: Path, output: str, follow: bool, last: int | None, since: float | None) -> None:
    """Show changes of state: drafts, commits, leases, engines and their roles, locks, epochs, waits for memory, servers that were started.

    A server keeps the last ones in its memory, so those from before its start are not shown. With -o json there is a line for each.
    """
    past, cursors = _past(devices, runtime_dir)
    if since is not None:
        past = [told for told in past if told.event.time_s >= since]
    most = last if last is not None else RECENT if follow and since is None else len(past)
    shown = past[max(0, len(past) - most) :]
    lines = Lines(output, [path.stem for path in cursors])
    for told in shown:
        lines.show(told)
    if follow:
        _follow(devices, runtime_dir, cursors, lines)


def _past(devices: tuple[str, ...], runtime_dir: Path) -> tuple[list[Told], dict[Path, Cursor]]:
    from gms_core.fleet.event_reader import read_past
    from gms_core.runtime_dir import sockets

    paths = sockets(runtime_dir, devices)
    if not paths:
        raise ServerUnavailable(f"no server has a socket in {runtime_dir}", hint="Start one with: gms serve (without a GPU: gms serve --device host)")
    found: list[Told] = []
    cursors: dict[Path, Cursor] = {}
    refused: list[GmsError] = []
    for path in paths:
        try:
            told, cursors[path] = read_past(path, CLIENT)
        except GmsError as error:
            refused.append(error)
        else:
            found += told
    if not cursors:
        raise refused[0]
    for refusal in refused:
        click.echo(as_text(refusal), err=True)
    return sorted(found, key=lambda told: told.event.time_s), cursors


def _follow(devices: tuple[str, ...], runtime_dir: Path, cursors: dict[Path, Cursor], lines: Lines) -> None:
    """Show until Ctrl-C, which is the way to end it and no failure."""
    from gms_core.fleet.event_reader import EventReader

    try:
        with EventReader(runtime_dir, devices, CLIENT, cursors) as reader:
            for told in reader:
                lines.show(told)
    except KeyboardInterrupt:
        return


class Lines:
    """Shows one line for each event.

    Args:
        output: ``table`` or ``json``.
        devices: Whose events are expected: their names are aligned.
    """

    def __init__(self, output: str, devices: list[str]) -> None:
        self._as_json = output == "json"
        self._width = max(map(len, devices), default=0)
        if not self._as_json:
            self._row("time", "device", "kind", "subject", "event")

    def show(self, told: Told) -> None:
        """Print it."""
        from gms_core.events import sentence

        event = told.event
        words = sentence(event.kind, event.facts)
        if not self._as_json:
            moment = dt.datetime.fromtimestamp(event.time_s).astimezone()
            self._row(moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{moment.microsecond // 1000:03d}", told.device, event.kind, event.subject, words)
            return
        fields = {"time": event.time_s, "monotonic_s": event.monotonic_s, "device": told.device, "log": told.log, "number": event.number}
        fields |= {"kind": event.kind, "subject": event.subject, "facts": event.facts, "text": words}
        click.echo(json.dumps({"schema": SCHEMA, **fields}))

    def _row(self, moment: str, device: str, kind: str, subject: str, words: str) -> None:
        from gms_core.cli.console import plain
        from gms_core.events import Kind

        kinds = max(map(len, Kind))
        click.echo(plain(f"{moment:<23}  {device:<{self._width}}  {kind:<{kinds}}  {subject:<12}  {words}"))
