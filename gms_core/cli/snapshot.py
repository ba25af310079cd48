"""``gms snapshot``: published memory goes to disks, or to an object store, and comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from gms_core.cli.options import Root, Size, count, format_size, output_option, ranks_option, runtime_dir_option
from gms_core.errors import InvalidArgument

if TYPE_CHECKING:
    from gms_core.snapshot.config import SnapshotConfig

SCHEMA = "gms-snapshot-command/1"
Command = TypeVar("Command", bound=Callable[..., object])

DIRECTORY = click.Path(path_type=Path, readable=False)

snapshot_argument = click.argument("snapshot", metavar="SNAPSHOT")
root_option = click.option(
    "--root",
    "roots",
    multiple=True,
    type=Root(),
    help="Directory that snapshots lie in, or a URL such as s3://bucket/prefix. Several directories: each image is striped over all.  "
    "[default: GMS_SHARDED_SSD_ROOTS, GMS_CHECKPOINT_DIR]",
)
device_option = click.option("--device", "devices", multiple=True, metavar="UUID|host", help="Only this device. Can be given several times.")
backend_option = click.option(
    "--backend", metavar="NAME", help="What moves the bytes.  [default: GMS_TRANSFER_BACKEND, else staged, or object for a URL]"
)
option_option = click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="For the backend. Can be given several times.")
metrics_option = click.option(
    "--metrics-file", type=click.Path(path_type=Path, dir_okay=False), help="File for its metrics.  [default: GMS_METRICS_FILE, else none]"
)
control_option = click.option("--control-dir", type=DIRECTORY, help="Directory of the sentinels.  [default: GMS_CONTROL_DIR, else none]")


def workers_option(variable: str) -> Callable[[Command], Command]:
    return click.option(
        "--workers", type=click.IntRange(min=0), help=f"Threads for each image; 0 for as many as suit the backend.  [default: {variable}, else 0]"
    )


_PUBLISHING = (
    click.option("--pool", default="", help="Pool to publish it in.  [default: the one that it was saved from]"),
    device_option,
    click.option("--expect", "expected", multiple=True, metavar="KEY=VALUE", help="A field that the identity must have. Can be given several times."),
    click.option("--if-missing", is_flag=True, help="Leave out what a pool has committed already."),
    click.option("--replace", type=click.IntRange(min=1), metavar="GENERATION", help="Drop this committed generation first, once nobody reads it."),
    click.option("--pin", is_flag=True, help="Keep the generation without readers, also when a later one is committed."),
    click.option(
        "--timeout", type=click.FloatRange(min=0, max=1e6), default=60.0, show_default=True, metavar="SECONDS", help="To wait for the right to write."
    ),
    click.option(
        "--memory-timeout",
        type=click.FloatRange(min=0, max=1e6),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="To wait for memory that others release.",
    ),
)


def publishing_options(command: Command) -> Command:
    """The options of commands that publish what was somewhere else."""
    for option in reversed(_PUBLISHING):
        command = option(command)
    return command


@click.group()
def snapshot() -> None:
    """Snapshots: published weights on disks or in object stores, and back."""


@snapshot.command(short_help="Save what a pool has committed.")
@click.argument("name", metavar="NAME")
@root_option
@click.option("--pool", default="weights", show_default=True, help="The pool.")
@device_option
@ranks_option
@backend_option
@option_option
@workers_option("GMS_SAVE_WORKERS")
@control_option
@metrics_option
@click.option("--shard-size", type=Size(), help="Of the largest file or object, a multiple of 16 MiB.  [default: GMS_SHARD_SIZE_BYTES, else 4 GiB]")
@click.option("--resume", is_flag=True, help="Go on with the newest save under this name that has ended without a snapshot.")
@runtime_dir_option
@output_option("text", "json")
def save(
    name: str,
    roots: tuple[Path | str, ...],
    pool: str,
    devices: tuple[str, ...],
    ranks: bool,
    backend: str | None,
    options: tuple[str, ...],
    workers: int | None,
    control_dir: Path | None,
    metrics_file: Path | None,
    shard_size: int | None,
    resume: bool,
    runtime_dir: Path,
    output: str,
) -> None:
    """Save what a pool has committed, on every device that has it, as the next version of NAME.

    Engines serve meanwhile. Nothing that was saved before is touched: there is a new snapshot once all of it is on the disks, or there is none.
    """
    from gms_core.cli.snapshot_metrics import recorded
    from gms_core.cli.snapshot_places import sources
    from gms_core.cli.snapshot_progress import progress, show
    from gms_core.snapshot.on_disk import check_name
    from gms_core.snapshot.whole import save_snapshot

    check_name(name)
    config = _config(
        roots,
        backend=backend,
        save_workers=workers,
        shard_bytes=shard_size,
        control_dir=_absolute(control_dir),
        metrics_file=_absolute(metrics_file),
        options=pairs(options),
    )
    with recorded(config.metrics_file, "save", name) as record:
        with progress(output) as watch:
            outcome = save_snapshot(lambda: sources(runtime_dir, pool, devices, ranks=ranks), name, config, watch, resume=resume)
        record(outcome)
        show("save", outcome, output)
    if outcome.untold is not None:
        raise outcome.untold


@snapshot.command(short_help="Publish a snapshot.")
@snapshot_argument
@root_option
@publishing_options
@backend_option
@option_option
@workers_option("GMS_LOAD_WORKERS")
@control_option
@metrics_option
@runtime_dir_option
@output_option("text", "json")
def restore(
    snapshot: str,
    roots: tuple[Path | str, ...],
    pool: str,
    devices: tuple[str, ...],
    expected: tuple[str, ...],
    if_missing: bool,
    replace: int | None,
    pin: bool,
    timeout: float,
    memory_timeout: float,
    backend: str | None,
    options: tuple[str, ...],
    workers: int | None,
    control_dir: Path | None,
    metrics_file: Path | None,
    runtime_dir: Path,
    output: str,
) -> None:
    """Publish SNAPSHOT, NAME or NAME@VERSION, as the next generation of the pools that it was saved from.

    Every byte is compared with its checksum, and nothing is published before all images have arrived.
    """
    from gms_core.cli.snapshot_metrics import recorded
    from gms_core.cli.snapshot_places import targets
    from gms_core.cli.snapshot_progress import progress, show
    from gms_core.snapshot.whole import restore_snapshot

    config = _config(
        roots,
        backend=backend,
        load_workers=workers,
        control_dir=_absolute(control_dir),
        metrics_file=_absolute(metrics_file),
        options=pairs(options),
    )
    with recorded(config.metrics_file, "restore", snapshot) as record:
        with progress(output) as watch:
            outcome = restore_snapshot(
                snapshot,
                config,
                lambda images: targets(images, runtime_dir, devices, pool),
                watch,
                expected=pairs(expected),
                if_missing=if_missing,
                replace=replace,
                pin=pin,
                timeout_s=timeout,
                memory_timeout_s=memory_timeout,
            )
        record(outcome)
        show("restore", outcome, output)
    if outcome.untold is not None:
        raise outcome.untold


@snapshot.command(name="list", short_help="Show the snapshots.")
@click.argument("name", metavar="[NAME]", required=False, default="")
@root_option
@output_option("table", "json")
def list_snapshots(name: str, roots: tuple[Path | str, ...], output: str) -> None:
    """Show all snapshots, or those of NAME, and saves that did not become one, with the reason."""
    from gms_core.snapshot.on_disk import check_name
    from gms_core.snapshot.shelves import open_shelf

    if name:
        check_name(name)
    found = open_shelf(_config(roots).roots).entries(name)
    if output == "json":
        click.echo(json.dumps({"schema": SCHEMA, "snapshots": [{**one._asdict(), "path": str(one.path)} for one in found]}, indent=2))
        return
    from rich.table import Table

    from gms_core.cli.console import plain, standard_output

    table = Table("snapshot", "state", "size", "images", "saved at", "reason", box=None, pad_edge=True)
    for one in found:
        size = format_size(one.size) if one.size else "-"
        table.add_row(f"{one.name}@{one.version}", one.state, size, str(one.images or "-"), one.saved_at or "-", plain(one.reason) or "-")
    standard_output().print(table if found else "no snapshot")


@snapshot.command(short_help="Compare a snapshot with its checksums.")
@snapshot_argument
@root_option
@backend_option
@option_option
@workers_option("GMS_LOAD_WORKERS")
@output_option("text", "json")
def verify(snapshot: str, roots: tuple[Path | str, ...], backend: str | None, options: tuple[str, ...], workers: int | None, output: str) -> None:
    """Read all of SNAPSHOT, NAME or NAME@VERSION, and compare it with its checksums. Needs no server and no device."""
    from gms_core.cli.snapshot_progress import progress, show
    from gms_core.snapshot.whole import verify_snapshot

    config = _config(roots, backend=backend, load_workers=workers, options=pairs(options))
    with progress(output) as watch:
        outcome = verify_snapshot(snapshot, config, watch)
    show("verify", outcome, output)


@snapshot.command(short_help="Remove old snapshots, and what failed saves have left.")
@click.argument("name", metavar="NAME")
@root_option
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="Remove all but the N newest that can be read.")
@click.option("--version", "number", type=click.IntRange(min=1), metavar="VERSION", help="Remove this one.")
@click.option(
    "--incomplete",
    is_flag=True,
    help="Remove also what lies partly in roots that were not given; in an object store also saves of which it is not known whether they go on.",
)
@output_option("text", "json")
def prune(name: str, roots: tuple[Path | str, ...], keep: int | None, number: int | None, incomplete: bool, output: str) -> None:
    """Remove snapshots of NAME, and what was left of saves that did not become one.

    With neither --keep nor --version, only the latter. What is being read stays, and is named; in an object store nobody sees who reads.
    """
    from gms_core.snapshot.on_disk import check_name
    from gms_core.snapshot.shelves import open_shelf

    check_name(name)
    if keep is not None and number is not None:
        raise InvalidArgument("--keep and --version do not go together", hint="Leave one of them out.")
    done = open_shelf(_config(roots).roots).prune(name, keep=keep, version=number or 0, incomplete=incomplete)
    if output == "json":
        click.echo(json.dumps({"schema": SCHEMA, "action": "prune", "name": name, **done._asdict()}))
        return
    removed = ", ".join(f"{name}@{version}" for version in done.removed) or "nothing"
    in_use = f"; {', '.join(f'{name}@{version}' for version in done.in_use)} stays, since it is being read" if done.in_use else ""
    swept = f"; {count(len(done.swept), 'unfinished folder')} swept" if done.swept else ""
    click.echo(f"removed: {removed}{in_use}{swept}")


@snapshot.command(short_help="Measure saves and restores.")
@root_option
@click.option("--bytes", "size", type=Size(), default="1GiB", show_default=True, metavar="SIZE", help="Of the image.")
@click.option("--device", metavar="UUID|host", help="Whose memory to use.  [default: the first GPU, or host without one]")
@click.option("--backend", "backends", multiple=True, metavar="NAME", help="Only this one. Can be given several times.  [default: all]")
@click.option("--workers", type=click.IntRange(min=0, max=256), default=0, show_default=True, help="Threads; 0 for as many as suit each backend.")
@output_option("table", "json")
def benchmark(roots: tuple[Path | str, ...], size: int, device: str | None, backends: tuple[str, ...], workers: int, output: str) -> None:
    """Save and restore a throw-away image with each backend, beside plain writes and reads with the same kind of memory in the same run.

    It has a server of its own, and needs room for two images, on the device and on the disks; nothing of them is left. Files are dropped from
    the page cache before they are read, as far as their file system does that.
    """
    from gms_core.cli.snapshot_benchmark_command import run

    run(_config(roots).roots, size, device, backends, workers, as_json=output == "json")


def _config(roots: Sequence[Path | str], **given: object) -> SnapshotConfig:
    """The configuration.

    Raises:
        ConfigurationError: An option, or a variable, is wrong.
        InvalidArgument: There is no root.
    """
    from gms_core.snapshot.config import snapshot_config

    config = snapshot_config({"roots": tuple(roots), **given})
    if not config.roots:
        raise InvalidArgument(
            "a snapshot needs a root",
            hint="Name a directory, or a URL such as s3://bucket/prefix, with --root, or set GMS_CHECKPOINT_DIR or GMS_SHARDED_SSD_ROOTS.",
        )
    return config


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def pairs(words: Sequence[str]) -> dict[str, str] | None:
    """What was written as ``KEY=VALUE``; None if nothing was."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"{word!r} is not KEY=VALUE")
        found[key] = value
    return found or None


# The further commands need what is above; whoever imports the group has all of them.
from gms_core.cli import snapshot_peers as snapshot_peers  # noqa: E402
