"""``gms bench``: measurements that anybody can repeat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.options import Size, count, format_size, output_option

if TYPE_CHECKING:
    from rich.table import Table

    from gms_core.cli.attach_benchmark import Result, Tell


@click.group()
def bench() -> None:
    """Measure what GMS costs on this machine."""


@bench.command()
@click.option("--device", metavar="UUID|host", help="Device to measure.  [default: the first GPU, or host without one]")
@click.option(
    "--runtime-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Use the running server there.  [default: a private server in a temporary directory]",
)
@click.option("--bytes", "size", type=Size(), metavar="SIZE", help="Size of the pool.  [default: 100GiB, 1GiB on host, less if less is free]")
@click.option("--slab", type=Size(), metavar="SIZE", help="Size of a slab.  [default: 1GiB, 64MiB on host]")
@click.option("--repeat", type=click.IntRange(1, 1000), default=5, show_default=True, help="Fresh processes of each kind.")
@output_option("table", "json")
def attach(device: str | None, runtime_dir: Path | None, size: int | None, slab: int | None, repeat: int, output: str) -> None:
    """Time how long a new process needs to map a published pool.

    Each repetition is two fresh processes: one attaches through the client, from connecting to mapped; the other times the bare driver on
    descriptors that it has already, which is the limit of this machine. The device's library is loaded before the clock starts.
    """
    from gms_core.cli.attach_benchmark import SCHEMA, default_device, measure, private_server
    from gms_core.devices import DeviceId
    from gms_core.runtime_dir import socket_path

    chosen = DeviceId(device) if device else default_device(runtime_dir)
    with _progress() as tell:
        if runtime_dir is not None:
            result = measure(socket_path(chosen, runtime_dir.absolute()), size, slab, repeat, tell)
        else:
            tell("starting a private server")
            with private_server(chosen) as socket:
                result = measure(socket, size, slab, repeat, tell)
    if output == "json":
        click.echo(json.dumps({"schema": SCHEMA, **dataclasses.asdict(result)}, indent=2))
        return
    from gms_core.cli.console import standard_output

    standard_output().print(table(result))


@contextlib.contextmanager
def _progress() -> Iterator[Tell]:
    """Say what is being done, on a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as line:
        yield line.update


def table(result: Result) -> Table:
    """The output for people."""
    from rich.table import Table

    from gms_core.cli.attach_worker import PHASES

    size = f"{format_size(result.bytes)} in {count(result.allocations, 'allocation')} on {result.device}"
    shown = Table(title=f"attach {size}, repeated {count(result.repeat, 'time')}, ms", title_justify="left", box=None)
    shown.add_column("phase")
    shown.add_column("")
    for kind in ("GMS", "bare driver"):
        for column in ("min", "median", "max"):
            shown.add_column(f"{kind}\n{column}" if column == "min" else f"\n{column}", justify="right")
    for phase, meaning in {**PHASES, "total": "from connecting to mapped"}.items():
        cells = []
        for kind in ("attach", "bare"):
            found = result.times[kind].get(phase)
            cells += [f"{1000 * value:.2f}" for value in (found.min, found.median, found.max)] if found else ["-"] * 3
        shown.add_row(phase, meaning, *cells, style="bold" if phase == "total" else "")
    return shown
