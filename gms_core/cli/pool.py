"""``gms pool``: the generations of published pools, and what an operator can do about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from gms_core.cli.options import device_option, format_size, output_option, ranks_option, runtime_dir_option
from gms_core.errors import GenerationConflict, GenerationNotFound, GmsError, InvalidArgument, LeaseConflict, PoolNotFound, VersionMismatch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gms_core.client import PoolGenerations
    from gms_core.protocol.messages import GenerationStatus, PoolStatus, StatusReport

SCHEMA = "gms-pool/1"
CLIENT = "gms pool"

pool_argument = click.argument("pool", metavar="POOL")
generation_argument = click.argument("generation", metavar="GENERATION", type=click.IntRange(min=1))


@click.group()
def pool() -> None:
    """Generations of published weights: what keeps them, pins, and the way back."""


@pool.command(name="list", short_help="Show the generations of published pools.")
@device_option
@runtime_dir_option
@output_option("table", "json")
def list_generations(devices: tuple[str, ...], runtime_dir: Path, output: str) -> None:
    """Show every generation that is there, who reads it, and whether it is pinned."""
    from gms_core.cli.servers import states

    answers = states(runtime_dir, CLIENT, devices)
    found = [state.report for state in answers if state.report is not None]
    for report in found:
        for one in report.pools:
            _check_tells(one, report)
    for state in answers:
        if state.error is not None:
            click.echo(f"gms: {state.silence}", err=True)
    if output == "json":
        pools = [{"device": report.device, **msgspec.to_builtins(one)} for report in found for one in report.pools]
        click.echo(json.dumps({"schema": SCHEMA, "runtime_dir": str(runtime_dir), "pools": pools}, indent=2))
    else:
        from gms_core.cli.console import standard_output

        standard_output().print(_table(found))


@pool.command(short_help="Keep a generation without readers.")
@pool_argument
@click.argument("generation", metavar="[GENERATION]", type=click.IntRange(min=1), required=False)
@ranks_option
@device_option
@runtime_dir_option
@output_option("text", "json")
def pin(pool: str, generation: int | None, ranks: bool, devices: tuple[str, ...], runtime_dir: Path, output: str) -> None:
    """Keep GENERATION of POOL without readers, until it is unpinned. Without GENERATION: the committed one."""

    def chosen(status: PoolStatus, _: StatusReport) -> GenerationStatus:
        if generation is None and not status.generation:
            raise GenerationNotFound(f"no generation of pool {status.name!r} is committed")
        return _there(status, generation or status.generation)

    def carry_out(handle: PoolGenerations, one: GenerationStatus) -> dict[str, object]:
        handle.pin(one.generation)
        return {"generation": one.generation, "outcome": f"generation {one.generation} is pinned"}

    _each("pin", _found(pool, ranks, devices, runtime_dir), runtime_dir, output, chosen, carry_out)


@pool.command(short_help="Keep a generation no more than any other.")
@pool_argument
@generation_argument
@ranks_option
@device_option
@runtime_dir_option
@output_option("text", "json")
def unpin(pool: str, generation: int, ranks: bool, devices: tuple[str, ...], runtime_dir: Path, output: str) -> None:
    """Keep GENERATION of POOL no more than any other: it is freed once nobody reads it, unless it is the committed one."""

    def chosen(status: PoolStatus, _: StatusReport) -> GenerationStatus:
        return _there(status, generation)

    def carry_out(handle: PoolGenerations, one: GenerationStatus) -> dict[str, object]:
        handle.unpin(one.generation)
        freed = not one.committed and not one.readers  # a generation that is not the committed one gets no readers any more
        return {"generation": one.generation, "outcome": f"generation {one.generation} is not pinned any more" + (", and is freed" if freed else "")}

    _each("unpin", _found(pool, ranks, devices, runtime_dir), runtime_dir, output, chosen, carry_out)


@pool.command(short_help="Publish an older generation once more.")
@pool_argument
@generation_argument
@click.option(
    "--expect",
    type=click.IntRange(min=0),
    required=True,
    metavar="GENERATION",
    help="The generation that is committed now, 0 for none; else refused.",
)
@ranks_option
@device_option
@runtime_dir_option
@output_option("text", "json")
def rollback(pool: str, generation: int, expect: int, ranks: bool, devices: tuple[str, ...], runtime_dir: Path, output: str) -> None:
    """Make the layout of GENERATION, which a pin or readers have kept, the committed one of POOL again, under a new number and without a copy.

    The generation that is committed now stays for its readers and its pin. Nothing is changed on any device if one of them lacks GENERATION, or has
    committed another one than expected.
    """

    def chosen(status: PoolStatus, _: StatusReport) -> GenerationStatus:
        if status.generation != expect:
            raise GenerationConflict(f"generation {expect} of pool {status.name!r} was expected, but {status.generation or 'none'} is committed")
        if generation == expect:
            raise InvalidArgument(f"generation {generation} of pool {status.name!r} is the committed one already")
        return _there(status, generation)

    def carry_out(handle: PoolGenerations, one: GenerationStatus) -> dict[str, object]:
        new = handle.rollback(one.generation, expected=expect)
        return {"generation": new, "to": one.generation, "outcome": f"generation {one.generation} is the committed one again, as generation {new}"}

    _each("rollback", _found(pool, ranks, devices, runtime_dir), runtime_dir, output, chosen, carry_out)


@pool.command(short_help="Free a generation that nobody reads.")
@pool_argument
@generation_argument
@ranks_option
@device_option
@runtime_dir_option
@output_option("text", "json")
def drop(pool: str, generation: int, ranks: bool, devices: tuple[str, ...], runtime_dir: Path, output: str) -> None:
    """Free GENERATION of POOL, the committed one too, if nobody reads it and it is not pinned. The next writer publishes anew."""
    from gms_core.cli.console import plain

    def chosen(status: PoolStatus, report: StatusReport) -> GenerationStatus:
        found = _there(status, generation)
        if found.readers:
            names = {session.id: f"{plain(session.client)} (pid {session.pid})" for session in report.sessions}
            who = ", ".join(names.get(reader, f"session {reader}") for reader in found.readers)
            raise LeaseConflict(f"generation {generation} of pool {status.name!r} on {report.device} is read by {who}", hint="End them first.")
        if found.pinned:
            raise LeaseConflict(f"generation {generation} of pool {status.name!r} is pinned", hint=f"gms pool unpin {status.name} {generation}")
        return found

    def carry_out(handle: PoolGenerations, one: GenerationStatus) -> dict[str, object]:
        handle.drop(one.generation)
        return {"generation": one.generation, "outcome": f"generation {one.generation} is freed"}

    _each("drop", _found(pool, ranks, devices, runtime_dir), runtime_dir, output, chosen, carry_out)


def _there(status: PoolStatus, generation: int) -> GenerationStatus:
    """A generation of a pool.

    Raises:
        GenerationNotFound: It is not there.
    """
    found = next((one for one in status.generations if one.generation == generation), None)
    if found is None:
        there = ", ".join(str(one.generation) for one in status.generations) or "none"
        raise GenerationNotFound(f"pool {status.name!r} has no generation {generation}", hint=f"It has: {there}.")
    return found


def _check_tells(status: PoolStatus, report: StatusReport) -> None:
    """Raise `VersionMismatch` if a pool has a generation and its server tells of none: it is of a version that knows nothing of this."""
    if status.generation and not status.generations:
        raise VersionMismatch(
            f"the server of {report.device} (gms {report.server}) is too old to tell of generations",
            hint="gms serve --replace, of this version of gms, takes over from it.",
        )


def _found(name: str, ranks: bool, devices: tuple[str, ...], runtime_dir: Path) -> list[tuple[StatusReport, PoolStatus]]:
    """A pool on every device that has it.

    Args:
        name: Of the pool.
        ranks: Whether those of further ranks go with it on the device ``host``.
        devices: Which ones; none: all.
        runtime_dir: Of the servers.

    Raises:
        ServerUnavailable: Not all of the servers answer.
        PoolNotFound: No device has the pool.
        VersionMismatch: A server is too old for all of this.
    """
    from gms_core.cli.servers import all_reports, is_meant

    found = [
        (report, status)
        for report in all_reports(runtime_dir, CLIENT, devices)
        for status in report.pools
        if is_meant(status.name, report.device, name, ranks=ranks)
    ]
    if not found:
        raise PoolNotFound(f"no server has a pool {name!r}", hint="gms pool list shows them.")
    for report, status in found:
        _check_tells(status, report)
    return found


def _each(
    action: str,
    found: list[tuple[StatusReport, PoolStatus]],
    runtime_dir: Path,
    output: str,
    chosen: Callable[[PoolStatus, StatusReport], GenerationStatus],
    carry_out: Callable[[PoolGenerations, GenerationStatus], dict[str, object]],
) -> None:
    """Do something to pools, once all of them have been looked at.

    Args:
        action: What is done.
        found: The pools.
        runtime_dir: Of the servers.
        output: Format.
        chosen: Gives the generation, or refuses.
        carry_out: Does it and tells the outcome.

    Raises:
        GmsError: As these two say. What was done to other pools before is told in the hint.
    """
    from gms_core.client import PoolGenerations, connect
    from gms_core.devices import DeviceId
    from gms_core.runtime_dir import socket_path

    wanted = [(report.device, status.name, chosen(status, report)) for report, status in found]
    done: list[str] = []
    for device, name, generation in wanted:
        try:
            with connect(socket_path=socket_path(DeviceId(device), runtime_dir), client=CLIENT) as session:
                told = carry_out(PoolGenerations(session, name), generation)
        except GmsError as error:
            if done:
                error.add_hint(f"Done already: {', '.join(done)}.")
            raise
        done.append(f"{name} on {device}")
        if output == "json":
            click.echo(json.dumps({"schema": SCHEMA, "action": action, "device": device, "pool": name, **told}))
        else:
            click.echo(f"{name} on {device}: {told['outcome']}")


def _table(found: list[StatusReport]) -> RenderableType:
    from rich.table import Table

    from gms_core.cli.console import plain

    table = Table("pool", "device", "generation", "state", "size", "readers", "pinned", "digest", "model", box=None, pad_edge=True)
    for report in found:
        for one in report.pools:
            for generation in one.generations:
                table.add_row(
                    one.name,
                    report.device,
                    str(generation.generation),
                    "committed" if generation.committed else "retired",
                    format_size(generation.bytes),
                    str(len(generation.readers)),
                    "yes" if generation.pinned else "-",
                    generation.digest[:12],
                    plain(generation.identity.get("model", "-")),
                )
    return table if table.row_count else "no generation"
