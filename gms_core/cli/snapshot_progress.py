"""How far a save or a restore is, on standard error, and at the end what it has cost, on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gms_core.cli.console import plain
from gms_core.cli.options import count, format_size
from gms_core.cli.snapshot import SCHEMA
from gms_core.snapshot.orders import Begun, Done, Moving, Progress, Waiting

if TYPE_CHECKING:
    from rich.progress import TaskID

    from gms_core.snapshot.processes import Watch
    from gms_core.snapshot.whole import Outcome

EVERY_S = 5.0
"""Seconds from one line to the next where there is no terminal."""
DRAW_S = 0.1
"""Seconds from one drawing of the bars to the next: they are drawn by the thread that hears of the images, so none is left when that one ends."""
DONE = {"save": "saved", "restore": "restored", "verify": "verified", "pull": "pulled"}


@contextlib.contextmanager
def progress(output: str) -> Iterator[Watch]:
    """What is told how far each image is. A bar on a terminal, a line now and then elsewhere; with JSON, nothing but the bar.

    Where that cannot be written any more, because the terminal is closed or the disk is full, nothing is shown, and the work goes on.
    """
    if sys.stderr.isatty():
        with _bars() as watch:
            yield _quietly(watch)
    elif output == "json":
        yield lambda _, __: None
    else:
        yield _quietly(Lines())


def _quietly(watch: Watch) -> Watch:
    def told(name: str, report: Progress) -> None:
        with contextlib.suppress(OSError):
            watch(name, report)

    return told


class Lines:
    """A line now and then, on standard error."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._sizes: dict[str, int] = {}
        self._moved: dict[str, int] = {}
        self._reasons: dict[str, str] = {}

    def __call__(self, name: str, report: Progress) -> None:
        """Take a report in, and print a line if it is time."""
        match report:
            case Begun():
                self._sizes[name] = report.bytes
            case Moving():
                self._moved[name] = report.bytes
            case Waiting() if self._reasons.get(name) != report.reason:
                self._reasons[name] = report.reason
                click.echo(plain(f"{name} waits: {report.reason}"), err=True)
        now = time.monotonic()
        if now - self._last >= EVERY_S:
            self._last = now
            moved, size = sum(self._moved.values()), sum(self._sizes.values())
            rate = format_size(int(moved / (now - self._began)))
            click.echo(f"{format_size(moved)} of {format_size(size)} in {now - self._began:.0f} s, {rate} a second", err=True)


@contextlib.contextmanager
def _bars() -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=Console(stderr=True, markup=False), auto_refresh=False)
    tasks: dict[str, TaskID] = {}
    drawn = 0.0

    def watch(name: str, report: Progress) -> None:
        nonlocal drawn
        if name not in tasks:
            tasks[name] = bars.add_task(plain(name), total=None)
        match report:
            case Begun():
                bars.update(tasks[name], total=report.bytes)
            case Moving() if report.bytes:
                bars.update(tasks[name], completed=report.bytes, description=plain(name))  # what it has waited for is there
            case Waiting():
                bars.update(tasks[name], description=plain(f"{name}: {report.reason}"))
        if time.monotonic() - drawn >= DRAW_S:
            drawn = time.monotonic()
            bars.refresh()

    with contextlib.suppress(OSError):
        bars.start()
    try:
        yield watch
    finally:
        with contextlib.suppress(OSError):
            bars.stop()


def show(action: str, outcome: Outcome, output: str) -> None:
    """Print what was done, and what each image has cost."""
    manifest = outcome.manifest
    if output == "json":
        facts = {"name": manifest.name, "version": manifest.version, "id": manifest.id, "saved_at": manifest.saved_at, "bytes": manifest.size}
        click.echo(json.dumps({"schema": SCHEMA, "action": action, **facts, "images": [_facts(name, done) for name, done in outcome.images]}))
        return
    click.echo(f"{DONE[action]} {manifest.name}@{manifest.version}: {format_size(manifest.size)} in {count(len(manifest.images), 'image')}")
    for name, done in outcome.images:
        click.echo(f"{name}: {as_line(done) if done is not None else 'it is committed already'}")
        for note in done.figures.notes if done is not None else ():
            click.echo(f"{name}: note: {note}")


def _facts(name: str, done: Done | None) -> dict[str, Any]:
    if done is None:
        return {"image": name, "present": True}
    return {"image": name, "present": False, "generation": done.generation, **msgspec.to_builtins(done.figures)}


def as_line(done: Done) -> str:
    """What an image has cost, in one line; the threads' times are summed over all threads."""
    figures = done.figures
    facts = [f"generation={done.generation}"] if done.generation else []
    facts += [f"bytes={figures.bytes}", f"seconds={figures.seconds:.3f}"]
    facts += [f"rate={figures.bytes / figures.seconds / 1e9:.2f}GB/s"] if figures.seconds else []
    facts += [f"kept={figures.kept_bytes}"] if figures.kept_bytes else []
    facts += [f"{name}_s={spent:.3f}" for name, spent in figures.around.items()]
    facts += [f"threads_{name}_s={spent:.3f}" for name, spent in sorted(figures.threads.items())]
    return " ".join(facts)
