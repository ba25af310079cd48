"""``gms snapshot benchmark``: its server, and its output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from gms_core.cli.attach_benchmark import default_device, private_server
from gms_core.cli.options import format_size
from gms_core.cli.snapshot_benchmark import SCHEMA, Result, measure
from gms_core.client import connect
from gms_core.devices import device_id
from gms_core.snapshot.orders import Figures
from gms_core.snapshot.registry import find, names
from gms_core.snapshot.running import moves_objects
from gms_core.snapshot.shelves import open_shelf
from gms_core.snapshot.transfer import Where

if TYPE_CHECKING:
    from rich.table import Table


def run(roots: Sequence[Where], size: int, device: str | None, backends: Sequence[str], workers: int, *, as_json: bool) -> None:
    """Measure, and print what was measured.

    Raises:
        GmsError: Something has failed that all backends need.
    """
    chosen = device_id(device) if device is not None else default_device(None)
    for backend in backends:
        find(backend)
    shelf = open_shelf(roots, create=True)
    objects = any(isinstance(root, str) for root in shelf.roots)
    chosen_backends = backends or [name for name in names() if moves_objects(find(name)) == objects]
    with private_server(chosen) as socket:
        with connect(socket_path=socket) as session:
            granularity = session.welcome.granularity
        whole = -(-size // granularity) * granularity
        result = measure(socket, roots, whole, chosen_backends, workers, lambda what: click.echo(what, err=True))
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, **msgspec.to_builtins(result)}, indent=2))
        return
    from gms_core.cli.console import standard_output

    standard_output().print(table(result))


def table(result: Result) -> Table:
    """The output for people."""
    from rich.table import Table

    where = f"{format_size(result.bytes)} on {result.device}, {', '.join(result.roots)}, GB/s"
    shown = Table("", "save", "verify", "of plain reads", "of fio's", "restore", "", title=where, title_justify="left", box=None)
    plain, by_fio = _rate_of(result.bytes, result.plain_read_s), _rate_of(result.bytes, result.fio_read_s)

    def add(name: str, saved: float, read: float, restored: float = 0.0, notes: str = "") -> None:
        shown.add_row(name, _shown(saved), _shown(read), _part(read, plain), _part(read, by_fio), _shown(restored), notes)

    add(f"plain, {result.workers} threads", _rate_of(result.bytes, result.plain_write_s), plain)
    if by_fio:
        add("fio, libaio", _rate_of(result.bytes, result.fio_write_s), by_fio)
    for one in result.runs:
        add(one.backend, _rate(one.save), _rate(one.verify), _rate(one.restore), one.error or "; ".join(one.restore.notes if one.restore else ()))
    return shown


def _rate(figures: Figures | None) -> float:
    """Bytes a second of a transfer; of a save with the time until the disks have it."""
    return figures.bytes / (figures.seconds + figures.around.get("sync", 0.0)) if figures is not None and figures.seconds else 0.0


def _rate_of(size: int, seconds: float) -> float:
    return size / seconds if seconds else 0.0


def _part(rate: float, whole: float) -> str:
    return f"{rate / whole:.0%}" if rate and whole else "-"


def _shown(rate: float) -> str:
    return f"{rate / 1e9:.2f}" if rate else "-"
