"""``gms bench failover`` for people: a table of what was measured, and the timeline of one failover, as lines of text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from gms_core.cli.failover_benchmark_result import Failover, Result, moments
from gms_core.cli.options import count

_ROWS = {
    "first_token": "first token",
    "noticed": "server knows of it",
    "elected": "shadow elected",
    "held": "memory granted",
    "mapped": "memory mapped",
    "listening": "listening",
    "gone": "dead engine gone",
    "first_token_after_gone": "first token, after that",
}


def lines(result: Result) -> list[str]:
    """The result, in lines."""
    found = [f"{count(result.kills, 'kill')} ({result.kill}) on {', '.join(result.devices) or 'no device'}: {shlex.join(result.command)}", ""]
    found += [*_spreads(result), "", *_restarts(result), *_outcome(result)]
    chosen = result.median_failover()
    return [*found, "", *timeline(chosen)] if chosen is not None else found


def _spreads(result: Result) -> list[str]:
    spreads = result.spreads()
    names = [name for name in _ROWS if name in spreads]
    rows = [["ms after the kill", "min", "median", "p95", "max"]]
    for name in names:
        found = spreads[name]
        rows.append([_ROWS[name], *(f"{1000 * value:.1f}" for value in (found.min, found.median, found.p95, found.max))])
    return _aligned(rows)


def _restarts(result: Result) -> list[str]:
    ratios = result.ratios()
    found = []
    for name, restart in result.restarts.items():
        ratio = f", {ratios[name]:,.0f} times as long as the median failover" if name in ratios else ""
        gone = f"; killed, it was gone after {1000 * restart.kill_to_gone_s:.0f} ms"
        found.append(f"restart without GMS, {name}: {restart.start_to_first_token_s:.1f} s from its start to the first token{ratio}{gone}")
    return found


def _outcome(result: Result) -> list[str]:
    requests = [failover.requests for failover in result.failovers]
    compared = sum(failover.compared_tokens for failover in result.failovers)

    def total(name: str) -> int:
        return sum(int(getattr(one, name)) for one in requests)

    after = f"{total('broken')} ended without an answer, {total('rejected')} were answered with an error"
    found = [
        f"requests in flight: {total('in_flight')}, of which {total('in_flight_failed')} failed",
        f"requests sent after a kill: {after}; {total('refused')} tries found nobody listening",
        f"tokens: {compared} compared, {result.wrong_tokens} wrong; primaries at once: {result.max_primaries}",
    ]
    if result.stock_tokens_equal is not None:
        found.append(f"tokens of the engine without GMS: {'the same' if result.stock_tokens_equal else 'DIFFERENT'}")
    return found + [f"FAULT: {fault}" for fault in result.faults()]


def timeline(failover: Failover) -> list[str]:
    """One failover, a line for each event."""
    heading = f"kill {failover.number} ({failover.kind} of {failover.engine}; {failover.successor} takes over), ms after it:"
    rows = [[f"{moment.after_ms:.1f}", moment.name.replace("_", " "), moment.meaning] for moment in moments(failover)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [heading, *(f"  {row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their first cell to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
