"""``gms bench``: measurements that anybody can repeat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import RUNTIME_DIR, Size, count, format_size, output_option
from gms_core.config import settings
from gms_core.errors import ConfigurationError, InvalidArgument

if TYPE_CHECKING:
    from rich.table import Table

    from gms_core.cli.attach_benchmark import Result, Tell
    from gms_core.cli.failover_benchmark_result import Failover

RESTARTS = ("cold", "warm")
PICTURES = (".svg", ".png")


@click.group()
def bench() -> None:
    """Measure what GMS costs on this machine."""


@bench.command()
@click.option("--device", metavar="UUID|host", help="Device to measure.  [default: the first GPU, or host without one]")
@click.option(
    "--runtime-dir",
    type=RUNTIME_DIR,
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
    from gms_core.cli.serve import resolve
    from gms_core.devices import device_id
    from gms_core.runtime_dir import socket_path

    settings()  # what is wrong in the environment is told here, and not by the private server
    chosen = device_id(device) if device is not None else default_device(runtime_dir)
    with _progress() as tell:
        if runtime_dir is not None:
            result = measure(socket_path(chosen, runtime_dir.absolute()), size, slab, repeat, tell)
        else:
            resolve((chosen,), "To measure host memory: gms bench attach --device host")
            tell("starting a private server")
            with private_server(chosen) as socket:
                result = measure(socket, size, slab, repeat, tell)
    if output == "json":
        click.echo(json.dumps({"schema": SCHEMA, **dataclasses.asdict(result)}, indent=2))
        return
    from gms_core.cli.console import standard_output

    standard_output().print(table(result))


@bench.command()
@click.option("--device", metavar="UUID|host", help="Device to measure.  [default: the first GPU, or host without one]")
@click.option("--readers", type=click.IntRange(1, 10000), default=1000, show_default=True, help="Read leases at a time, at most.")
@click.option("--sessions", type=click.IntRange(1, 10**6), default=10000, show_default=True, help="Sessions that are opened and closed.")
@click.option("--pieces", type=click.IntRange(1, 50000), default=3500, show_default=True, help="Allocations of the pool that is attached to.")
@output_option("table", "json")
def server(device: str | None, readers: int, sessions: int, pieces: int, output: str) -> None:
    """Time the round trips of a private server with many readers, sessions and allocations.

    Beside them stands a bare round trip of a Unix socket, and what the server's process takes before, meanwhile and afterwards.
    """
    from gms_core.cli.attach_benchmark import default_device, private_server
    from gms_core.cli.serve import resolve
    from gms_core.cli.server_benchmark import SCHEMA, measure
    from gms_core.devices import device_id

    settings()
    chosen = device_id(device) if device is not None else default_device(None)
    resolve((chosen,), "To measure host memory: gms bench server --device host")
    with _progress() as tell:
        tell("starting a private server")
        with private_server(chosen) as socket:
            result = measure(socket, readers, sessions, pieces, tell)
    if output == "json":
        click.echo(json.dumps({"schema": SCHEMA, **dataclasses.asdict(result)}, indent=2))
        return
    from gms_core.cli.console import standard_output
    from gms_core.cli.server_benchmark_table import tables

    for shown in tables(result):
        standard_output().print(shown)


def _restarts(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    chosen = tuple(word.strip() for word in value.split(",")) if value != "none" else ()
    if not set(chosen) <= set(RESTARTS):
        raise click.BadParameter(f"{value!r} is none of cold,warm, cold, warm and none")
    return chosen


@bench.command(
    "failover",
    short_help="Kill engines that serve, and time their shadows.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--kills", type=click.IntRange(1, 10000), default=20, show_default=True, help="How often a primary is killed.")
@click.option(
    "--kill",
    "kind",
    type=click.Choice(["group", "front-end", "engine-core", "worker", "detokenizer", "mixed"]),
    default="group",
    show_default=True,
    help="What of it: all its processes, one of them, or something else each time.",
)
@click.option("--load", type=click.IntRange(0, 1024), default=8, show_default=True, metavar="REQUESTS", help="Requests in flight at each kill.")
@click.option(
    "--shadows",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Engines that stand by. Kills follow one another until none does.",
)
@click.option(
    "--restarts",
    default="cold,warm",
    show_default=True,
    callback=_restarts,
    metavar="cold,warm|cold|warm|none",
    help="Restarts of the engine without GMS that are timed too: cold before all else, warm after it.",
)
@click.option("--restart-command", metavar="COMMAND", help="Command of the engine without GMS.  [default: the same command]")
@click.option("--prompt-tokens", type=click.IntRange(1, 10**6), default=32, show_default=True, help="Length of the prompts.")
@click.option("--new-tokens", type=click.IntRange(1, 10**6), default=64, show_default=True, help="Length of the answers.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts, and of all that is random.")
@click.option(
    "--device",
    "names",
    multiple=True,
    metavar="UUID|host|all",
    help="Device that the engines need. Can be given several times.  [default: all GPUs, or host without one]",
)
@click.option("--timeout", type=click.FloatRange(min=0), default=900.0, show_default=True, metavar="SECONDS", help="For an engine to become ready.")
@click.option(
    "--timeline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw the median failover into an .svg or .png file."
)
@click.option("--log-dir", type=click.Path(file_okay=False, path_type=Path), help="Keep the output of all processes there, and each kill's result.")
@click.option(
    "--show",
    "saved",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="FILE",
    help="Show a result that -o json has given before.",
)
@output_option("table", "json")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def failover_command(
    kills: int,
    kind: str,
    load: int,
    shadows: int,
    restarts: tuple[str, ...],
    restart_command: str | None,
    prompt_tokens: int,
    new_tokens: int,
    seed: int,
    names: tuple[str, ...],
    timeout: float,
    timeline: Path | None,
    log_dir: Path | None,
    saved: Path | None,
    output: str,
    command: tuple[str, ...],
) -> None:
    """Kill the engine that serves, again and again, and time how long it takes until its shadow answers at the same port.

    COMMAND starts one engine, such as: vllm serve MODEL --port 8000. It runs with shadows beside a private server, as under gms run. Greedy tokens
    after each kill are compared with those before the first one. The exit code is 3 if one is wrong, or if there were ever two primaries.
    """
    from gms_core.cli.failover_benchmark import Wanted, measure
    from gms_core.cli.failover_benchmark_client import endpoint_of
    from gms_core.cli.failover_benchmark_restart import command_without_gms, default_port
    from gms_core.cli.failover_benchmark_result import INTERRUPTED, document, read
    from gms_core.cli.failover_benchmark_table import lines
    from gms_core.cli.serve import resolve

    draw = _drawing(timeline) if timeline is not None else None
    if saved is not None:
        result = read(saved)
    elif not command:
        raise click.UsageError("Missing argument 'COMMAND...': what starts one engine.")
    else:
        resolve(names, "For engines that run on CPU: gms bench failover --device host -- COMMAND")
        wanted = Wanted(
            command=command,
            restart_command=command_without_gms(command, restart_command) if restarts else (),
            endpoint=endpoint_of(command, default_port(command)),
            kills=kills,
            kill=None if kind == "mixed" else kind,  # type: ignore[arg-type]  # one of the choices
            load=load,
            shadows=shadows,
            restarts=restarts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seed=seed,
            devices=names,
            log_dir=log_dir.absolute() if log_dir is not None else None,
            patience_s=timeout,
        )
        with _progress() as tell, _told_to_end_in_order():
            result = measure(wanted, tell)
    click.echo(json.dumps(document(result), indent=2) if output == "json" else "\n".join(lines(result)))
    chosen = result.median_failover()
    if draw is not None and chosen is not None:
        draw(chosen)
    if result.faults():
        raise click.exceptions.Exit(ExitCode.INTERRUPTED if result.ended_by == INTERRUPTED else ExitCode.FINDINGS)


def _drawing(path: Path) -> Callable[[Failover], None]:
    """What draws a timeline into a file; asked for before anything is measured. It raises `InvalidArgument` if the file cannot be written then.

    Raises:
        InvalidArgument: The file cannot be made, or is no picture.
        ConfigurationError: matplotlib is missing.
    """
    if path.suffix not in PICTURES:
        raise InvalidArgument(f"--timeline {path} is no picture", hint=f"Its name has to end with {' or '.join(PICTURES)}.")
    if not path.absolute().parent.is_dir():
        raise InvalidArgument(f"--timeline {path}: there is no such directory")
    try:
        from gms_core.cli.failover_benchmark_plot import draw
    except ImportError as error:
        raise ConfigurationError("--timeline needs matplotlib, which is not installed", hint="Install it: pip install 'gms[bench]'") from error

    def draw_it(failover: Failover) -> None:
        try:
            draw(failover, path)
        except OSError as error:
            raise InvalidArgument(f"--timeline {path} cannot be written: {error.strerror}") from error

    return draw_it


@contextlib.contextmanager
def _told_to_end_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs as Ctrl-C does, engines included; one that is ignored stays so."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


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
