"""``python -m tools.bench``: see ``make bench``."""

from __future__ import annotations

import dataclasses
import datetime as dt
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gms_core.cli.attach_benchmark import default_device
from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import Size
from gms_core.cli.refusal import Refusal
from gms_core.devices import HOST, device_id
from gms_core.errors import GmsError, InvalidArgument
from tools.bench.commands import section
from tools.bench.document import SCHEMA, SECTIONS, Document, Loading, encode, read
from tools.bench.loaders import SOURCES, chosen
from tools.bench.loading import Wanted, measure
from tools.bench.machine import machine

BYTES = {"cuda": 4 * 2**30, "host": 2**30}
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("build/bench.json"), show_default=True, help="The document.")
@click.option("--bytes", "size", type=Size(), metavar="SIZE", help="Of the checkpoint and the image.  [default: 4GiB, 1GiB on host]")
@click.option("--device", metavar="UUID|host", help="Device to measure.  [default: the first GPU, or host without one]")
@click.option("--dir", "disk", type=FOLDER, default=Path("build"), show_default=True, help="Directory on the disk to measure.")
@click.option("--tmpfs", type=FOLDER, default=Path("/dev/shm"), show_default=True, help="Directory that lies in memory.")  # noqa: S108 - mkdtemp makes a private one in it
@click.option("--repeat", type=click.IntRange(1, 100), default=3, show_default=True, help="Processes for each figure of a loader.")
@click.option("--only", "sections", multiple=True, type=click.Choice(SECTIONS), help="Only this. Can be given several times.")
@click.option("--source", "sources", multiple=True, type=click.Choice(SOURCES), help="Load only from there. Can be given several times.")
@click.option("--loader", "loaders", multiple=True, metavar="NAME", help="Only this one. Can be given several times.")
@click.option("--show", type=click.Path(dir_okay=False, exists=True, path_type=Path), metavar="FILE", help="Show a document that is there already.")
def main(
    out: Path,
    size: int | None,
    device: str | None,
    disk: Path,
    tmpfs: Path,
    repeat: int,
    sections: tuple[str, ...],
    sources: tuple[str, ...],
    loaders: tuple[str, ...],
    show: Path | None,
) -> None:
    """Run all benchmarks that need no engine, and write one document.

    Each figure has its peer or its physical limit from the same run. The exit code is 1 if something of GMS has failed. A peer that is missing or
    fails is named with the reason, and changes nothing.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left in memory or on the disk
    try:
        if show is not None:
            _print(read(show))
            return
        chosen_device = device_id(device) if device is not None else default_device(None)
        kind = "host" if chosen_device == HOST else "cuda"
        disk.mkdir(parents=True, exist_ok=True)
        wanted = Wanted(
            device=chosen_device,
            size=size or BYTES[kind],
            repeat=repeat,
            disk=disk.absolute(),
            tmpfs=tmpfs.absolute(),
            sources=tuple(source for source in SOURCES if not sources or source in sources),
            loaders=chosen(loaders),
        )
        document = run(wanted, sections or SECTIONS)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode(document))
    except GmsError as error:
        raise Refusal(error, as_json=False, debug=False) from error
    except OSError as error:
        raise Refusal(InvalidArgument(f"{error.filename or out} cannot be written: {error.strerror}"), as_json=False, debug=False) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None
    _print(document)
    click.echo(f"\n{out} has all of it")
    if document.loading is not None and document.loading.interrupted:
        raise click.exceptions.Exit(ExitCode.INTERRUPTED)
    if failures := document.failures():
        click.echo("\n".join(["", *failures]), err=True)
        raise click.exceptions.Exit(ExitCode.FAILURE)


def run(wanted: Wanted, sections: Sequence[str]) -> Document:
    """Measure these sections, one after the other. What fails is part of the document."""
    date, began = dt.datetime.now(dt.UTC), time.monotonic()
    folders = {name: folder for name, folder in (("disk", wanted.disk), ("tmpfs", wanted.tmpfs)) if folder.is_dir()}
    found = machine(folders)
    told: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gms-bench-", dir=wanted.disk) as root:
        for name, words in _commands(wanted, root).items():
            if name in sections:
                _tell(f"gms {words[0]} {words[1]}")
                told[name] = section(name, *words)
    loading, error = _loading(wanted, told.get("snapshot", {})) if "loading" in sections else (None, "")
    return Document(
        schema=SCHEMA,
        date=date.isoformat(timespec="seconds"),
        duration_s=round(time.monotonic() - began, 1),
        machine=found,
        attach=told.get("attach"),
        server=told.get("server"),
        snapshot=told.get("snapshot"),
        loading=loading,
        loading_error=error,
    )


def _commands(wanted: Wanted, root: str) -> dict[str, tuple[str, ...]]:
    device = ("--device", str(wanted.device))
    return {
        "attach": ("bench", "attach", *device),
        "server": ("bench", "server", *device),
        "snapshot": ("snapshot", "benchmark", "--root", root, "--bytes", str(wanted.size), *device),
    }


def _loading(wanted: Wanted, snapshot: dict[str, Any]) -> tuple[Loading | None, str]:
    plain_s = snapshot.get("plain_read_s", 0.0)
    plain_rate = snapshot["bytes"] / plain_s if plain_s else 0.0
    try:
        return measure(dataclasses.replace(wanted, plain_rate=plain_rate), _tell), ""
    except GmsError as error:
        return None, str(error)


def _tell(what: str) -> None:
    click.echo(what, err=True)


def _print(document: Document) -> None:
    from gms_core.cli.console import standard_output
    from tools.bench.tables import lines

    console = standard_output()
    for shown in lines(document):
        if isinstance(shown, str):
            click.echo(shown)  # a sentence is not wrapped
        else:
            console.print(shown)


if __name__ == "__main__":
    sys.exit(main())
