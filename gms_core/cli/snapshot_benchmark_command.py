"""``gms snapshot benchmark``: its server, and its output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from gms_core.cli.attach_benchmark import default_device, private_server
from gms_core.cli.options import format_size
from gms_core.cli.snapshot_benchmark import SCHEMA, Result, measure
from gms_core.client import connect
from gms_core.devices import device_id
from gms_core.snapshot.orders import Figures
from gms_core.snapshot.registry import find, names
from gms_core.snapshot.roots import open_roots


def run(roots: Sequence[Path], size: int, device: str | None, backends: Sequence[str], workers: int, *, as_json: bool) -> None:
    """Measure, and print what was measured.

    Raises:
        GmsError: Something has failed that all backends need.
    """
    chosen = device_id(device) if device is not None else default_device(None)
    for backend in backends:
        find(backend)
    open_roots(roots, create=True)
    with private_server(chosen) as socket:
        with connect(socket_path=socket) as session:
            granularity = session.welcome.granularity
        whole = -(-size // granularity) * granularity
        result = measure(socket, roots, whole, backends or names(), workers, lambda what: click.echo(what, err=True))
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, **msgspec.to_builtins(result)}, indent=2))
    else:
        _table(result)


def _table(result: Result) -> None:
    from rich.table import Table

    from gms_core.cli.console import standard_output

    where = f"{format_size(result.bytes)} on {result.device}, {', '.join(result.roots)}, GB/s"
    shown = Table("", "save", "verify", "of plain reads", "restore", "", title=where, title_justify="left", box=None)
    read = result.bytes / result.plain_read_s if result.plain_read_s else 0.0
    shown.add_row(f"plain, {result.workers} threads", f"{result.bytes / result.plain_write_s / 1e9:.2f}", f"{read / 1e9:.2f}", "", "", "")
    for one in result.runs:
        verified = _rate(one.verify)
        part = f"{verified / read:.0%}" if read and verified else "-"
        notes = one.error or "; ".join(one.restore.notes if one.restore else ())
        shown.add_row(one.backend, _shown(_rate(one.save)), _shown(verified), part, _shown(_rate(one.restore)), notes)
    standard_output().print(shown)


def _rate(figures: Figures | None) -> float:
    """Bytes a second of a transfer; of a save with the time until the disks have it."""
    return figures.bytes / (figures.seconds + figures.around.get("sync", 0.0)) if figures is not None and figures.seconds else 0.0


def _shown(rate: float) -> str:
    return f"{rate / 1e9:.2f}" if rate else "-"
