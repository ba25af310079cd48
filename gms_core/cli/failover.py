"""``gms failover``: which engine serves, and the orders that an operator gives."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from gms_core.cli.options import device_option, format_size, output_option, ranks_option, runtime_dir_option
from gms_core.errors import AcquireTimeout, LeaseConflict, PoolNotFound, PromotionFailed, RoleConflict

if TYPE_CHECKING:
    from gms_core.fleet.engines import Engine
    from gms_core.protocol.messages import Role, StatusReport

SCHEMA = "gms-failover/1"
CLIENT = "gms failover"
LOOK_S = 0.1
"""Seconds between two looks while an order is being carried out."""

engine_argument = click.argument("engine", required=False)
wait_option = click.option("--wait", is_flag=True, help="Wait until the engine has done it.")
timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=0), default=120.0, show_default=True, metavar="SECONDS", help="How long to wait at most, with --wait."
)


@click.group()
def failover() -> None:
    """Which engine serves, which stand by, and who is to be next."""


@failover.command(short_help="Show engines, locks and retained memory.")
@runtime_dir_option
@output_option("table", "lines", "json")
def status(runtime_dir: Path, output: str) -> None:
    """Show the engines that have joined a server of the runtime directory, their roles, locks and retained memory.

    With -o lines: a line for each engine, with its name, role, state, epoch, cohort and processes, and a tab between them.
    """
    from gms_core.fleet.engines import engines

    reports = _reports(runtime_dir)
    found = engines(reports)
    if output == "json":
        click.echo(json.dumps(document(reports, found, runtime_dir), indent=2))
    elif output == "lines":
        for engine in found:
            pids = ",".join(str(member.pid) for member in engine.members)
            click.echo("\t".join((engine.name, engine.standing, engine.state, str(engine.epoch), engine.cohort, pids)))
    else:
        _show(reports, found)


@failover.command(short_help="Make an engine the next primary.")
@engine_argument
@wait_option
@timeout_option
@runtime_dir_option
@output_option("text", "json")
def promote(engine: str | None, wait: bool, timeout: float, runtime_dir: Path, output: str) -> None:
    """Make ENGINE, a name or a cohort, the next primary: before all others once the present one ends, or at once if there is none.

    Without ENGINE: the only one that stands by.
    """
    from gms_core.fleet.engines import choose, engines

    found = engines(_reports(runtime_dir))
    chosen = choose(found, engine, "standby")
    if chosen.standing == "primary":
        _told(chosen, "promote", "is the primary already", output)
        return
    if chosen.standing == "fenced" or chosen.state != "alive":
        raise RoleConflict(f"{chosen.name} is ending and cannot be promoted", hint="gms failover status shows who stands by.")
    primary = next((other for other in found if other.standing == "primary"), None)
    _instruct(chosen, "promote", runtime_dir)
    if not wait:
        after = f" once {primary.name} ends; to end it: gms failover demote {primary.name}" if primary is not None else ""
        _told(chosen, "promote", f"is to be the next primary{after}", output)
        return
    _wait_until(chosen, runtime_dir, timeout, "become the primary", _has_become_primary)
    _told(chosen, "promote", "is the primary", output)


@failover.command(short_help="End the primary in an orderly way; a shadow takes over.")
@engine_argument
@wait_option
@timeout_option
@runtime_dir_option
@output_option("text", "json")
def demote(engine: str | None, wait: bool, timeout: float, runtime_dir: Path, output: str) -> None:
    """Tell ENGINE, a name or a cohort, to finish its requests and to end; a shadow takes over.

    Without ENGINE: the primary.
    """
    from gms_core.fleet.engines import choose, engines

    chosen = choose(engines(_reports(runtime_dir)), engine, "primary")
    if chosen.standing not in ("promoting", "primary"):
        # The order would stand, and end the engine as soon as it serves.
        raise RoleConflict(f"{chosen.name} is {chosen.standing}: only a primary can be demoted", hint="To end a shadow, end its process.")
    _instruct(chosen, "demote", runtime_dir)
    if not wait:
        _told(chosen, "demote", "is to end", output)
        return
    _wait_until(chosen, runtime_dir, timeout, "end", lambda now: now is None)
    _told(chosen, "demote", "has ended", output)


@failover.command(short_help="Free retained memory that no engine uses.")
@click.argument("pool", nargs=-1)
@ranks_option
@device_option
@runtime_dir_option
@output_option("text", "json")
def drop(pool: tuple[str, ...], ranks: bool, devices: tuple[str, ...], runtime_dir: Path, output: str) -> None:
    """Free the memory of each retained POOL on all devices, and forget its plan, so that the next engine measures anew.

    Without POOL: all of them. Nothing is freed if an engine uses one of them already.
    """
    from gms_core.cli.servers import all_reports, is_meant
    from gms_core.client import connect
    from gms_core.devices import DeviceId
    from gms_core.protocol.messages import Drop
    from gms_core.runtime_dir import socket_path

    retained = [(report.device, found) for report in all_reports(runtime_dir, CLIENT, devices) for found in report.retained if found.state != "empty"]
    there = [(device, found) for device, found in retained if not pool or any(is_meant(found.name, device, name, ranks=ranks) for name in pool)]
    if missing := [name for name in sorted(set(pool)) if not any(is_meant(found.name, device, name, ranks=ranks) for device, found in there)]:
        raise PoolNotFound(f"nothing is retained in {', '.join(missing)}", hint="gms failover status lists them.")
    for device, found in there:
        if found.holder or found.users or found.state == "planning":
            raise LeaseConflict(
                f"pool {found.name!r} of {device} is in use", hint="End the engines that use it first: gms failover status lists them."
            )
    for device, found in there:
        with connect(socket_path=socket_path(DeviceId(device), runtime_dir), client=CLIENT) as session:
            session.perform(Drop(found.name))
        if output == "json":
            click.echo(json.dumps({"schema": SCHEMA, "device": device, "pool": found.name, "bytes": found.bytes}))
        else:
            click.echo(f"{format_size(found.bytes)} of pool {found.name} on {device} are free")


def document(reports: list[StatusReport], found: list[Engine], runtime_dir: Path) -> dict[str, object]:
    """The JSON output."""
    return {
        "schema": SCHEMA,
        "runtime_dir": str(runtime_dir),
        "engines": [{**msgspec.to_builtins(dataclasses.asdict(engine)), "role": engine.standing, "epoch": engine.epoch} for engine in found],
        "locks": [{"device": report.device, **msgspec.to_builtins(lock)} for report in reports for lock in report.locks],
        "retained": [{"device": report.device, **msgspec.to_builtins(pool)} for report in reports for pool in report.retained],
    }


def _reports(runtime_dir: Path) -> list[StatusReport]:
    from gms_core.cli.servers import reports

    return reports(runtime_dir, CLIENT)


def _show(reports: list[StatusReport], found: list[Engine]) -> None:
    from rich.console import Group

    from gms_core.cli.console import standard_output
    from gms_core.cli.engine_tables import engine_table, lock_table, retained_table

    parts = [engine_table(found) if found else None, lock_table(reports, found), retained_table(reports, found)]
    shown = [part for part in parts if part is not None]
    standard_output().print(Group(*shown) if shown else "no engine")


def _instruct(engine: Engine, order: Literal["promote", "demote"], runtime_dir: Path) -> None:
    """Give the order to the servers of all its devices: its first process asks each of them."""
    from gms_core.client import connect
    from gms_core.devices import DeviceId
    from gms_core.protocol.messages import Instruct
    from gms_core.runtime_dir import socket_path

    for device in engine.devices:
        with connect(socket_path=socket_path(DeviceId(device), runtime_dir), client=CLIENT) as session:
            session.perform(Instruct(engine.cohort, order))


def _has_become_primary(now: Engine | None) -> bool:
    if now is None or now.standing == "fenced":
        why = (now.reason or now.detail) if now is not None else "all its processes are gone"
        raise PromotionFailed(f"it has ended instead: {why}" if why else "it has ended instead")
    return now.standing == "primary"


def _wait_until(engine: Engine, runtime_dir: Path, timeout_s: float, what: str, done: Callable[[Engine | None], bool]) -> None:
    """Look at an engine again and again until it has done what it was told; it is None once it is gone.

    Raises:
        AcquireTimeout: It has not in time.
    """
    from gms_core.fleet.engines import engines

    deadline = time.monotonic() + timeout_s
    role: Role = engine.role
    while True:
        try:
            now = next((other for other in engines(_reports(runtime_dir)) if other.cohort == engine.cohort), None)
            if done(now):
                return
        except PromotionFailed as error:
            raise PromotionFailed(f"{engine.name} has not become the primary: {error.message}") from error
        role = now.standing if now is not None else role
        if time.monotonic() >= deadline:
            raise AcquireTimeout(f"{engine.name} is still {role} and did not {what} within {timeout_s:g} s", hint="gms failover status shows why.")
        time.sleep(LOOK_S)


def _told(engine: Engine, order: str, outcome: str, output: str) -> None:
    if output == "json":
        click.echo(json.dumps({"schema": SCHEMA, "engine": engine.name, "cohort": engine.cohort, "order": order, "outcome": outcome}))
    else:
        click.echo(f"{engine.name} {outcome}")
