"""``gms status``: what the servers hold, and for whom."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import age, count, format_size, output_option, runtime_dir_option
from gms_core.errors import ServerUnavailable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gms_core.cli.servers import ServerState
    from gms_core.fleet.event_reader import Cursor
    from gms_core.protocol.messages import PoolStatus, SessionStatus, StatusReport

SCHEMA = "gms-status/1"
CLIENT = "gms status"
SETTLE_S = 0.1
"""Seconds between an event and the next picture."""


@click.command(short_help="Show servers, pools, sessions and engines.")
@click.option(
    "--device", "devices", multiple=True, metavar="UUID|host", help="Only this device. Can be given several times.  [default: all that have a socket]"
)
@runtime_dir_option
@output_option("table", "json")
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=2.0,
    metavar="[SECONDS]",
    help="Show it again whenever something happens, and every 2 seconds if not told otherwise; with JSON, one line each time.",
)
def status(devices: tuple[str, ...], runtime_dir: Path, output: str, watch: float | None) -> None:
    """Show the servers of the runtime directory, their pools, locks and sessions, and the engines that fail over."""
    if watch is not None:
        _watch(devices, runtime_dir, output, watch)
        return
    states = _states(devices, runtime_dir)
    if output == "json":
        click.echo(json.dumps(document(states, runtime_dir), indent=2))
    else:
        from gms_core.cli.console import standard_output

        standard_output().print(table(states))
    if all(state.report is None for state in states):
        raise click.exceptions.Exit(ExitCode.NO_SERVER)


def document(states: list[ServerState], runtime_dir: Path) -> dict[str, object]:
    """The JSON output."""
    return {"schema": SCHEMA, "runtime_dir": str(runtime_dir), "servers": [state.as_dict() for state in states]}


def _states(devices: tuple[str, ...], runtime_dir: Path) -> list[ServerState]:
    from gms_core.cli.servers import ask
    from gms_core.runtime_dir import sockets

    paths = sockets(runtime_dir, devices)
    if not paths:
        raise ServerUnavailable(f"no server has a socket in {runtime_dir}", hint="Start one with: gms serve (without a GPU: gms serve --device host)")
    return [ask(path, CLIENT) for path in paths]


def _watch(devices: tuple[str, ...], runtime_dir: Path, output: str, seconds: float) -> None:
    """Show until Ctrl-C, which is the way to end it and no failure. A server that comes or goes meanwhile is part of the show."""
    from rich.console import Group
    from rich.live import Live

    from gms_core.cli.console import standard_output
    from gms_core.cli.servers import ask
    from gms_core.fleet.event_reader import EventReader
    from gms_core.runtime_dir import sockets

    console = standard_output()
    states = [ask(path, CLIENT) for path in sockets(runtime_dir, devices)]
    try:
        with (
            EventReader(runtime_dir, devices, CLIENT, _read_already(states)) as reader,
            Live(console=console, auto_refresh=False, screen=console.is_terminal and output != "json", transient=True) as live,
        ):
            while True:
                if output == "json":
                    click.echo(json.dumps(document(states, runtime_dir)))
                elif console.is_terminal:
                    shown = f"{time.strftime('%X')}, at each event and every {seconds:g} s; Ctrl-C ends"
                    live.update(Group(table(states), shown), refresh=True)
                else:
                    console.print(table(states))
                if reader.next(seconds) is not None:
                    time.sleep(min(SETTLE_S, seconds))  # what comes together is shown together
                    reader.drain()
                states = [ask(path, CLIENT) for path in sockets(runtime_dir, devices)]
    except KeyboardInterrupt:
        return


def _read_already(states: list[ServerState]) -> dict[Path, Cursor]:
    """How far the events need not be read, since their effects are in these states."""
    from gms_core.fleet.event_reader import Cursor

    seen = {state.socket: state.report.observation for state in states if state.report is not None}
    return {path: Cursor(observation.log, observation.last) for path, observation in seen.items() if observation is not None}


def table(states: list[ServerState]) -> RenderableType:
    """The output for people: a line for each server, then its pools, its locks and its sessions; then the engines, which may have several servers."""
    from rich.console import Group
    from rich.text import Text

    from gms_core.cli.engine_tables import engine_table, lock_table, retained_table
    from gms_core.fleet.engines import engines

    if not states:
        return Text("no server")
    found = engines(state.report for state in states if state.report is not None)
    parts: list[RenderableType] = []
    for state in states:
        if state.report is None:
            parts.append(Text.assemble((state.socket.stem, "bold"), "  ", ("dead", "bold red"), f"  {state.error.message if state.error else ''}"))
            continue
        report = state.report
        used = f"{format_size(report.allocated_bytes)} in {count(report.allocations, 'allocation')}"
        free = f"{format_size(report.memory_free)} of {format_size(report.memory_total)} free"
        line = f"  {report.driver}, pid {report.pid}, up {age(report.uptime_s)}, gms {report.server}; {used}; {free}"
        parts.append(Text.assemble((report.device, "bold"), "  ", ("up", "green"), line))
        if report.waiting_for_memory:
            first = "".join(f", the first for {format_size(one.bytes)}, {age(one.waited_s)} ago" for one in report.memory_queue[:1])
            parts.append(Text(f"  waiting for memory: {count(report.waiting_for_memory, 'request')}{first}", style="yellow"))
        parts += [_pools(report)] if report.pools else []
        parts += [_quotas(report)] if report.quotas else []
        parts += [part for part in (retained_table([report], found), lock_table([report], found)) if part is not None]
        # The session that asks for the status is not news.
        sessions = [session for session in report.sessions if session.leases or session.client != CLIENT]
        parts += [_sessions(sessions)] if sessions else []
    parts += [engine_table(found)] if found else []
    return Group(*parts)


def _pools(report: StatusReport) -> RenderableType:
    from rich.table import Table

    from gms_core.cli.console import plain

    pools = Table("pool", "state", "generation", "size", "allocations", "model", "readers", "writer", "waiting", box=None, pad_edge=True)
    for pool in report.pools:
        size = format_size(pool.bytes) + "".join(
            f" + {format_size(extra)} {what}" for extra, what in ((pool.draft_bytes, "draft"), (pool.retired_bytes, "retired")) if extra
        )
        pools.add_row(
            pool.name,
            pool.state,
            _generation(pool),
            size,
            str(pool.allocations),
            plain(pool.identity.get("model", "-")),
            str(len(pool.readers)),
            str(pool.writer or "-"),
            str(len(pool.waiting)),
        )
    return pools


def _generation(pool: PoolStatus) -> str:
    """The committed generation, and which ones are kept without readers."""
    pinned = ", ".join(str(one.generation) for one in pool.generations if one.pinned)
    return str(pool.generation or "-") + (f" (pinned: {pinned})" if pinned else "")


def _quotas(report: StatusReport) -> RenderableType:
    from rich.table import Table

    quotas = Table("quota", "of", "used", "limit", box=None, pad_edge=True)
    for quota in report.quotas:
        shown = [format_size(value) if quota.resource in ("bytes", "metadata") else str(value) for value in (quota.used, quota.limit)]
        quotas.add_row(quota.resource, f"{quota.scope} {quota.who}", *shown, style="yellow" if quota.used >= quota.limit else "")
    return quotas


def _sessions(found: list[SessionStatus]) -> RenderableType:
    from rich.table import Table

    from gms_core.cli.console import plain

    sessions = Table("session", "pid", "client", "age", "leases", "waits for", box=None, pad_edge=True)
    for session in found:
        leases = ", ".join(f"{lease} {pool}" for pool, lease in sorted(session.leases.items())) or "-"
        sessions.add_row(str(session.id), str(session.pid), plain(session.client), age(session.age_s), leases, plain(session.waiting_for) or "-")
    return sessions
