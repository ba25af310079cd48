"""The output of ``gms bench server`` for people."""

from __future__ import annotations

from rich.table import Table

from gms_core.cli.attach_benchmark import Range
from gms_core.cli.options import count
from gms_core.cli.server_benchmark import Result


def tables(result: Result) -> list[Table]:
    """Round trips, and the server's process."""
    times = _table(f"round trips with {result.device}, microseconds", "", "min", "median", "max")
    times.add_row("bare Unix socket", *_cells(result.echo, 1e6))
    for load in result.loads:
        times.add_row(f"read lease, {count(load.readers, 'reader')}", *_cells(load.acquire, 1e6))
        times.add_row("its release", *_cells(load.release, 1e6))
    others = _table("other times", "", "")
    others.add_row(f"session opened and closed, first of {result.sessions}", f"{result.session[0] * 1e6:.0f} us")
    others.add_row("the same, last", f"{result.session[-1] * 1e6:.0f} us")
    others.add_row(f"lease, layout and descriptors of {count(result.pieces, 'allocation')}", f"{result.export.median * 1e3:.1f} ms")
    server = _table("the server's process", "", "memory, MiB", "open files")
    for when, found in (
        ("before", result.server_before),
        (f"with {count(result.loads[-1].readers, 'reader')}", result.server_full),
        ("afterwards", result.server_after),
    ):
        server.add_row(when, f"{found.resident_bytes / 2**20:.1f}", str(found.descriptors))
    return [times, others, server]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _cells(found: Range, scale: float) -> list[str]:
    return [f"{value * scale:.0f}" for value in (found.min, found.median, found.max)]
