"""``gms run``: keep a primary and its shadows alive on this node."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli import run_nodes
from gms_core.cli.options import Root, output_option, runtime_dir_option
from gms_core.cli.refusal import as_text
from gms_core.config import child_environment
from gms_core.errors import InvalidArgument, ServerUnavailable

if TYPE_CHECKING:
    from gms_core.engine_config import FailoverConfig
    from gms_core.plugins.engines import EngineAdapter

MOST_ENGINES = 65
"""Shadows, and one that serves."""
KEEP_S = 30
"""Seconds for which a server of ours is kept alive beyond itself: without this process there are no engines that need its memory."""
NUMBER = "{n}"
"""What stands for the engine's number in the command."""
UNKNOWN_COMMAND = (
    "gms: the command is of no engine that an adapter knows, and is run as it is\n"
    "hint: If it starts no engine that uses GMS, it never joins a server. In a script, an engine needs --load-format gms."
)


@click.command(
    short_help="Keep a primary and its shadows alive on this node.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--shadows", type=click.IntRange(0, 64), default=1, show_default=True, help="Engines that stand by, besides the primary.")
@click.option(
    "--parallel-starts",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Shadows that may be starting at once. The first engine always starts alone.",
)
@click.option("--name", default="engine", show_default=True, help="Engines are called by it and their number: engine-0, engine-1.")
@click.option("--lock", metavar="gms:NAME|flock:PATH|etcd:...|k8s:...", help="What elects the primary.  [default: gms:primary]")
@click.option("--gate", type=click.Choice(["port", "503"]), help="How a shadow is held back: it does not listen, or it answers 503.  [default: port]")
@click.option("--on-promoted", metavar="COMMAND", help="Command that an engine runs once it serves.")
@click.option("--webhook", metavar="URL", help="Where an engine posts each change of its role.")
@click.option("--status-address", metavar="HOST:PORT", help="Where an engine answers /gms/status and /health besides its own port; with {n} in it.")
@click.option(
    "--device",
    "names",
    multiple=True,
    metavar="UUID|host|all",
    help="Device whose server is needed. Can be given several times.  [default: any that runs, or all]",
)
@click.option("--no-serve", is_flag=True, help="Start no server: fail if none runs.")
@click.option("--restore", metavar="SNAPSHOT", help="Publish this snapshot, NAME or NAME@VERSION, before engines start, unless that is done already.")
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=Root(),
    help="Directory that the snapshot lies in, or a URL such as s3://bucket/prefix. Can be given several times.  "
    "[default: GMS_SHARDED_SSD_ROOTS, GMS_CHECKPOINT_DIR]",
)
@click.option(
    "--log-dir", type=click.Path(file_okay=False, path_type=Path), help="Directory of the engines' output.  [default: logs in the runtime directory]"
)
@click.option(
    "--stop-timeout", type=click.FloatRange(min=0), default=30.0, show_default=True, metavar="SECONDS", help="For each engine to end by itself."
)
@click.option(
    "--start-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="For an engine to be ready after its start; then it is ended and started again.",
)
@run_nodes.options
@runtime_dir_option
@output_option("table", "lines", "json")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(
    shadows: int,
    parallel_starts: int,
    name: str,
    lock: str | None,
    gate: str | None,
    on_promoted: str | None,
    webhook: str | None,
    status_address: str | None,
    names: tuple[str, ...],
    no_serve: bool,
    restore: str | None,
    roots: tuple[Path | str, ...],
    log_dir: Path | None,
    stop_timeout: float,
    start_timeout: float,
    nnodes: int,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int,
    agents_port: int,
    secret: Path | None,
    runtime_dir: Path,
    output: str,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND as one engine that serves and others that stand by, until Ctrl-C.

    COMMAND starts one engine, such as: vllm serve MODEL --port 8000. In it, {n} stands for the engine's number. A server is started if none runs. An
    engine that ends is started again, as a shadow. Ctrl-C ends the shadows, the primary, then the server if it was started here; a second one kills.
    """
    from gms_core.cli.run_display import display
    from gms_core.cli.run_restore import restore_command
    from gms_core.failover.locks import check_lock
    from gms_core.fleet.restarts import Policy
    from gms_core.fleet.supervisor import Wanted, supervise
    from gms_core.runtime_dir import ANY_GROUP, prepare

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise InvalidArgument(f"{name!r} cannot be the name of engines", hint="Use 1 to 64 letters, digits, '_', '.' or '-': logs are called by it.")
    options = {"lock": lock, "gate": gate, "on_promoted": _words(on_promoted), "webhook": webhook, "status_address": status_address}
    nodes = run_nodes.nodes_of(nnodes, node_rank, master_addr, master_port, agents_port, secret, engines=MOST_ENGINES)
    failover = _failover(options, 0)
    _check_addresses(failover, status_address, command, several=shadows > 0)
    check_lock(failover.lock)
    adapter, prepared = _command(command)
    if nodes is not None:
        nodes.command(adapter, prepared, 0)  # what cannot be is known at once
    directory = prepare(runtime_dir, ANY_GROUP)
    restoring = restore_command(restore, roots, names, directory)
    devices, serve = _servers(names, directory, no_serve=no_serve)
    wanted = Wanted(
        command=lambda number: [_numbered(word, number) for word in (prepared if nodes is None else nodes.command(adapter, prepared, number))],
        environment=lambda number: _environment(options, directory, name, number, nodes),
        name=name,
        engines=1 + shadows,
        lock=failover.lock,
        runtime_dir=directory,
        devices=devices,
        serve=serve,
        log_dir=_log_dir(log_dir or directory / "logs"),
        policy=Policy(autonomous=failover.autonomous, start_timeout_s=start_timeout, parallel_starts=parallel_starts, follows=bool(node_rank)),
        stop_timeout_s=stop_timeout,
        restore=restoring,
    )
    with display(output) as shown:
        supervise(wanted, shown.change, shown.tick)


def _words(command: str | None) -> tuple[str, ...] | None:
    try:
        return tuple(shlex.split(command)) if command is not None else None
    except ValueError as error:
        raise InvalidArgument(f"--on-promoted cannot be read as a command: {error}") from error


def _failover(options: Mapping[str, object], number: int) -> FailoverConfig:
    """The failover block of an engine: GMS_FAILOVER, with what the options say in its place."""
    from gms_core.engine_config import FailoverConfig, GmsConfig, validated
    from gms_core.failover.config import failover_config

    inherited = failover_config(GmsConfig()) or FailoverConfig()
    given = {key: _numbered(value, number) if isinstance(value, str) else value for key, value in options.items() if value is not None}
    names = [f"--{key.replace('_', '-')}" for key in options]
    own = validated(FailoverConfig, given, where="the options of gms run", options=names)
    return inherited.model_copy(update=own.model_dump(exclude_unset=True))


def _check_addresses(failover: FailoverConfig, status_address: str | None, command: Sequence[str], *, several: bool) -> None:
    """Raise `InvalidArgument` if engines would get in one another's way."""
    if several and failover.gate == "503" and not any(NUMBER in word for word in command):
        raise InvalidArgument(
            "with the gate 503 every engine listens, so each needs a port of its own",
            hint=f"Write {NUMBER} where it differs, such as: --port 800{NUMBER}",
        )
    if several and failover.status_address is not None and NUMBER not in (status_address or ""):
        raise InvalidArgument(
            f"several engines cannot have the status address {failover.status_address}",
            hint=f"Write {NUMBER} where it differs, such as: --status-address 127.0.0.1:900{NUMBER}",
        )


def _environment(options: Mapping[str, object], directory: Path, name: str, number: int | None, nodes: run_nodes.Nodes | None) -> dict[str, str]:
    """The environment of an engine, or of the server if there is no number."""
    if number is None:
        return child_environment(GMS_RUNTIME_DIR=str(directory))
    block = _failover(options if nodes is None else {**options, "nodes": nodes.block(number)}, number).model_dump_json(exclude_unset=True)
    return child_environment(GMS_RUNTIME_DIR=str(directory), GMS_ENGINE=f"{name}-{number}", GMS_FAILOVER=block)


def _command(command: Sequence[str]) -> tuple[EngineAdapter | None, list[str]]:
    """The adapter of the command's engine, and the command with what that needs. A warning is printed if no adapter knows it.

    Raises:
        InvalidArgument: There is no such program.
        ConfigurationError: The command says something that the engine cannot do with GMS.
    """
    from gms_core.plugins.engines import EngineAdapter
    from gms_core.plugins.loading import load

    program = _numbered(command[0], 0)
    if shutil.which(program) is None:
        raise InvalidArgument(f"there is no command {program!r}", hint="Is the engine's environment active? A path works too.")
    plugins = load()
    adapters = plugins.collect("gms_engines", EngineAdapter)
    for error in plugins.broken:
        click.echo(as_text(error), err=True)
    for adapter in adapters:
        if adapter.command is not None and (known := adapter.command(command)) is not None:
            return adapter, known
    click.echo(UNKNOWN_COMMAND, err=True)
    return None, list(command)


def _numbered(word: str, number: int) -> str:
    return word.replace(NUMBER, str(number))


def _servers(names: tuple[str, ...], directory: Path, *, no_serve: bool) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The devices whose servers have to answer, none for any, and the command that starts those that do not.

    Raises:
        ServerUnavailable: One has to be started, and none may be.
        InvalidArgument: No device can have one of the names.
        DeviceNotFound: There is no such device.
    """
    from gms_core.cli.serve import ALL, resolve
    from gms_core.cli.servers import ask
    from gms_core.runtime_dir import sockets

    up = {state.report.device for state in (ask(path, "gms run") for path in sockets(directory)) if state.report is not None}
    if up and not names:
        return (), None
    wanted = resolve(names or (ALL,), "For engines that run on CPU: gms run --device host -- COMMAND")
    missing = [device for device in wanted if device not in up]
    if not missing:
        return tuple(wanted), None
    if no_serve:
        raise ServerUnavailable(
            f"no server answers in {directory} for {', '.join(missing)}", hint="Start it with gms serve, or leave --no-serve out."
        )
    command = [sys.executable, "-P", "-m", "gms_core.cli", "serve", "--runtime-dir", str(directory), "--keep", str(KEEP_S)]
    return tuple(wanted), (*command, *(word for device in missing for word in ("--device", device)))


def _log_dir(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InvalidArgument(
            f"no file can be made in the directory of logs {directory}: {error.strerror}", hint="Name another one with --log-dir."
        ) from error
    return directory.absolute()
