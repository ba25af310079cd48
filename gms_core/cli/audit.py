"""``gms audit``: names the tensors that are written to after they were published."""

from __future__ import annotations

import contextlib
import itertools
import math
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.options import output_option, ranks_option, runtime_dir_option
from gms_core.errors import GenerationNotFound, GmsError, InvalidArgument, PoolNotFound
from gms_core.stop_signals import stop_signals

if TYPE_CHECKING:
    from gms_core.audit import Audited
    from gms_core.protocol.messages import PoolStatus, StatusReport

CLIENT = "gms audit"
LONGEST_INTERVAL_S = 86400.0
ANSWER_S = 0.5
"""Seconds that a server has to answer before the audit goes on without it."""


def _finite(_: click.Context, __: click.Parameter, seconds: float | None) -> float | None:
    if seconds is not None and not math.isfinite(seconds):
        raise click.BadParameter(f"{seconds} is not a finite number of seconds")
    return seconds


@click.command(short_help="Name the tensors that are written to after publication.")
@click.argument("pool", metavar="[POOL]", required=False)
@click.option(
    "--device", "devices", multiple=True, metavar="UUID|host", help="Only this device. Can be given several times.  [default: all that have the pool]"
)
@ranks_option
@runtime_dir_option
@output_option("text", "json")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1, max=LONGEST_INTERVAL_S),
    callback=_finite,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="From the end of one look to the next.",
)
@click.option(
    "--for",
    "for_s",
    type=click.FloatRange(min=0, min_open=True),
    callback=_finite,
    metavar="SECONDS",
    help="End after so long, with a last look.  [default: Ctrl-C]",
)
@click.option("--rounds", type=click.IntRange(min=1), metavar="N", help="End after so many comparisons.  [default: Ctrl-C]")
def audit(
    pool: str | None, devices: tuple[str, ...], ranks: bool, runtime_dir: Path, output: str, every: float, for_s: float | None, rounds: int | None
) -> None:
    """Look at the committed generation of POOL, or of all pools, again and again, and name the tensors whose bytes have changed.

    The first look takes digests, and each one that follows is compared with the one before; what was written before the first look is not noticed.
    Ctrl-C ends it with what was found. The exit code is 3 when something was written.
    """
    if for_s is not None and rounds is not None:
        raise InvalidArgument("--for and --rounds do not go together", hint="Leave one of them out.")
    with contextlib.ExitStack() as ends:
        stop = ends.enter_context(_stop())
        watched = [Watched(one, as_json=output == "json") for one in _attach(pool, devices, runtime_dir, ends, ranks=ranks)]
        for one in watched:
            ends.callback(one.close)
        _look_again_and_again(watched, stop, every, math.inf if for_s is None else for_s, rounds)
        for one in watched:
            one.report.ended(time.time(), one.lost)
    if any(one.report.found for one in watched):
        raise click.exceptions.Exit(ExitCode.FINDINGS)
    for one in watched:
        if one.lost is not None:
            raise one.lost
    if not all(one.report.compared for one in watched):  # that nothing was written is not known
        raise click.exceptions.Exit(ExitCode.INTERRUPTED)


class Stop:
    """Whether the user wants it to end.

    Args:
        signals: Readable once that is so.
    """

    def __init__(self, signals: socket.socket) -> None:
        self._signals = signals

    def within(self, seconds: float) -> bool:
        """Whether that is so now, or within so many seconds, for which it waits. Safe from any thread."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def now(self) -> bool:
        """Whether that is so now."""
        return self.within(0)


@contextlib.contextmanager
def _stop() -> Iterator[Stop]:
    with stop_signals((signal.SIGINT, signal.SIGTERM)) as signals:
        yield Stop(signals)


class Watched:
    """One generation that is audited, and what is told of it.

    Attributes:
        report: To the user.
        lost: Why it cannot be looked at any more; None if it can.
    """

    def __init__(self, audited: Audited, *, as_json: bool) -> None:
        from gms_core.cli.audit_words import Report

        self.report = Report(audited, as_json=as_json)
        self.lost: GmsError | None = None
        self._audited, self._has_begun = audited, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gms-audit-status")
        self._answer: Future[int] | None = None

    def look(self, stop: Stop) -> None:
        """Look once, and tell what is found."""
        look = self._audited.look(stop.now)
        self.lost = look.error
        if self._has_begun:
            self.report.looked(look)
        elif look.complete:
            self._has_begun = True
            self.report.began(look)
        if self.lost is None:
            self._ask()

    def _ask(self) -> None:
        """Find out which generation is the committed one. A server that is away is not waited for: what it answers is heard after a later look."""
        if self._answer is None:
            self._answer = self._thread.submit(self._audited.committed)
        if not wait([self._answer], ANSWER_S).done:
            return
        try:
            self.report.committed(self._answer.result(), time.time())
        except GmsError as error:
            self.lost = error
        self._answer = None

    def close(self) -> None:
        """Wait for no server any more."""
        if self._answer is not None:
            self._audited.interrupt()
        self._thread.shutdown()


def _look_again_and_again(watched: Sequence[Watched], stop: Stop, every_s: float, for_s: float, rounds: int | None) -> None:
    """Look at all that can be, until the user, the time, the number of rounds or the loss of the last one ends it."""
    for one in watched:
        one.look(stop)
    deadline = time.monotonic() + for_s
    for _ in itertools.count() if rounds is None else range(rounds):
        if stop.within(min(every_s, max(0.0, deadline - time.monotonic()))):
            return
        is_last = time.monotonic() >= deadline
        for one in watched:
            if one.lost is None:
                one.look(stop)
        if is_last or all(one.lost is not None for one in watched):
            return


def _attach(name: str | None, devices: tuple[str, ...], runtime_dir: Path, ends: contextlib.ExitStack, *, ranks: bool) -> list[Audited]:
    """Lease and map what is to be audited, until ``ends`` does.

    Raises:
        PoolNotFound: There is no such published pool, or none at all.
        GenerationNotFound: Nothing is committed in it.
        GmsError: It cannot be leased or mapped.
    """
    from gms_core.audit import Audited
    from gms_core.cli.servers import reports
    from gms_core.client import connect
    from gms_core.devices import DeviceId
    from gms_core.layout import Identity
    from gms_core.runtime_dir import socket_path

    attached = []
    for report, pools in _chosen(name, reports(runtime_dir, CLIENT, devices), ranks=ranks):
        session = ends.enter_context(connect(socket_path=socket_path(DeviceId(report.device), runtime_dir), client=CLIENT))
        attached += [ends.enter_context(Audited(session, pool.name, Identity(pool.identity))) for pool in pools]
    return attached


def _chosen(name: str | None, found: Sequence[StatusReport], *, ranks: bool) -> list[tuple[StatusReport, list[PoolStatus]]]:
    """The pools that are meant, of each server that has one, with something committed in them."""
    from gms_core.cli.servers import is_meant

    def is_one(pool: str, report: StatusReport) -> bool:
        return name is None or is_meant(pool, report.device, name, ranks=ranks)

    meant = [(report, [pool for pool in report.pools if is_one(pool.name, report)]) for report in found]
    committed = [(report, [pool for pool in pools if pool.generation]) for report, pools in meant]
    chosen = [(report, pools) for report, pools in committed if pools]
    if chosen:
        return chosen
    if any(pools for _, pools in meant):
        raise GenerationNotFound(f"no generation of pool {name!r} is committed" if name else "no generation of any pool is committed")
    if name is None:
        raise PoolNotFound("no server that answers has a published pool", hint="gms status shows the servers and their pools.")
    if any(is_one(pool.name, report) for report in found for pool in report.retained):
        raise PoolNotFound(f"pool {name!r} is retained memory, which its holder is there to write", hint="Published pools can be audited.")
    raise PoolNotFound(f"no server that answers has a pool {name!r}", hint="gms pool list shows them.")
