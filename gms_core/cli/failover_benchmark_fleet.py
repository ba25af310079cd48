"""The engines of ``gms bench failover``: a private ``gms run``, an eye on what its servers say, and the killing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gms_core.cli.failover_benchmark_result import KINDS, Kind
from gms_core.client import Session, connect
from gms_core.config import child_environment
from gms_core.errors import AcquireTimeout, EngineFailed, GmsError, rebuild
from gms_core.exit_words import how
from gms_core.fleet.engines import Engine, engines
from gms_core.fleet.groups import Group, last_line
from gms_core.protocol.messages import EndStatus, StatusReport
from gms_core.runtime_dir import sockets

CLIENT = "gms bench failover"
NAME = "engine"
LOOK_S = 0.1
CLOSE_LOOK_S = 0.01
"""Seconds between two looks at the servers around a kill."""
STOP_S = 20
"""Seconds that an engine gets to end by itself."""
END_S = 120.0
SETTLE_S = 0.02

MOST_FAILURES = 3
RUN_LOG = "run.log"

_PROMOTED = re.compile(r"\[gms ([^\]]*\bevent=promoted\b[^\]]*)\]")
_PARTS: dict[Kind, tuple[str, ...]] = {
    "front-end": ("api-server",),
    "engine-core": ("engine-core", "rank"),
    "worker": ("rank", "engine-core"),
    "detokenizer": ("detokenizer",),
}
"""How the processes of an engine begin their names; where one process is two of these, it has joined as the one that it was first."""


class Lookout:
    """Asks all servers of a runtime directory for their state, again and again, and keeps what must not be missed.

    Attributes:
        close: Whether to look more often.
        max_primaries: The most engines that were the primary at once.
        devices: Whose servers have answered.
    """

    def __init__(self, directory: Path) -> None:
        self.close = False
        self.max_primaries = 0
        self.devices: tuple[str, ...] = ()
        self._directory = directory
        self._sessions: dict[Path, Session] = {}
        self._alive: set[str] = set()
        self._seen_ending: dict[str, float] = {}
        self._seen = threading.Condition()
        self._reports: tuple[StatusReport, ...] = ()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gms-lookout", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping = True
        self._thread.join()
        for session in self._sessions.values():
            session.close()

    def engines(self) -> list[Engine]:
        """As they were at the last look."""
        return engines(self._reports)

    def seen_ending(self, cohort: str) -> float:
        """When it was first seen that a cohort is being ended or has ended, on the monotonic clock; infinite if it was not."""
        return self._seen_ending.get(cohort, math.inf)

    def ends(self, cohort: str) -> list[EndStatus]:
        """What each server says of the end of a cohort."""
        return [end for report in self._reports for end in report.ends if end.cohort == cohort]

    def wait(self, condition: Callable[[], bool], what: str, patience_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until a condition holds after a look.

        Args:
            condition: It is asked after each look.
            what: What does not happen otherwise, in words.
            patience_s: Seconds to wait at most.
            check: Called after each look too; it raises to end the waiting.

        Raises:
            AcquireTimeout: It did not hold in time.
        """
        deadline = time.monotonic() + patience_s
        with self._seen:
            while not condition():
                check()
                if time.monotonic() >= deadline:
                    found = ", ".join(f"{engine.name} ({engine.standing})" for engine in self.engines()) or "none"
                    raise AcquireTimeout(f"{what} within {patience_s:g} s; the engines are: {found}")
                self._seen.wait(1.0)

    def _run(self) -> None:
        while not self._stopping:
            reports = tuple(report for path in sockets(self._directory) if (report := self._ask(path)) is not None)
            found = engines(reports)
            primaries = sum(engine.standing == "primary" for engine in found)
            alive = {engine.cohort for engine in found if engine.state == "alive"} if reports else self._alive
            with self._seen:
                self._reports = reports
                self._seen_ending |= dict.fromkeys(self._alive - alive, time.monotonic())
                self._alive = alive
                self.devices = tuple(report.device for report in reports) or self.devices
                self.max_primaries = max(self.max_primaries, primaries)
                self._seen.notify_all()
            time.sleep(CLOSE_LOOK_S if self.close else LOOK_S)

    def _ask(self, path: Path) -> StatusReport | None:
        try:
            if path not in self._sessions:
                self._sessions[path] = connect(socket_path=path, client=CLIENT)
            return self._sessions[path].status()
        except GmsError:
            lost = self._sessions.pop(path, None)
            if lost is not None:
                lost.close()
            return None


@dataclass(frozen=True, slots=True)
class Promotion:
    """What an engine's log says of its promotion.

    Attributes:
        elected_s: When it had the lock, on the monotonic clock.
        after_ms: Milliseconds since then, by the names of events.
    """

    engine: str
    term: int
    epoch: int
    elected_s: float
    after_ms: dict[str, float]


def promotions(log: str) -> list[Promotion]:
    """The promotions that a log tells of, with a time on the monotonic clock."""
    found = []
    for match in _PROMOTED.finditer(log):
        pairs = dict(pair.split("=", 1) for pair in match[1].split() if "=" in pair)
        if "elected_clock_s" in pairs:
            after = {name.removesuffix("_ms"): float(value) for name, value in pairs.items() if name.endswith("_ms")}
            found.append(
                Promotion(pairs.get("engine", ""), int(pairs.get("term", 0)), int(pairs.get("epoch", 0)), float(pairs["elected_clock_s"]), after)
            )
    return found


def failed_starts(lines: Iterable[str]) -> dict[str, tuple[int, str]]:
    """How often in a row each engine has ended before it could serve, and why it did last, as ``gms run -o json`` tells."""
    found: dict[str, tuple[int, str]] = {}
    running: set[str] = set()
    for line in lines:
        if not line.startswith("{"):
            continue
        change = json.loads(line)
        engine, state = str(change.get("subject", "")), str(change.get("state", ""))
        if state in ("standby", "promoting", "primary"):
            found.pop(engine, None)
            running.discard(engine)
        elif state in ("starting", "init"):
            running.add(engine)
        elif state == "waiting" and engine in running:
            running.discard(engine)
            found[engine] = found.get(engine, (0, ""))[0] + 1, str(change.get("detail", ""))
    return found


class Fleet:
    """A private ``gms run``, until the context ends."""

    def __init__(self, command: Sequence[str], shadows: int, devices: Sequence[str], runtime_dir: Path, log_dir: Path) -> None:
        """Prepare.

        Args:
            command: Of the engine.
            shadows: How many stand by. All of them may be starting at once.
            devices: Whose servers to start; empty for all GPUs.
            runtime_dir: An empty directory.
            log_dir: Where the output of all processes goes.
        """
        self._command = [sys.executable, "-P", "-m", "gms_core.cli", "run", "--name", NAME, "--gate", "port"]
        self._command += ["--shadows", str(shadows), "--parallel-starts", str(shadows)]
        self._command += [word for device in devices for word in ("--device", device)]
        self._command += ["--runtime-dir", str(runtime_dir), "--log-dir", str(log_dir), "--stop-timeout", str(STOP_S), "-o", "json", "--", *command]
        self._log_dir = log_dir
        self._group: Group | None = None

    def __enter__(self) -> Self:
        self._group = Group(self._command, child_environment(), self._log_dir / RUN_LOG, "gms run")
        return self

    def check(self) -> None:
        """Raise if there is no point in waiting.

        Raises:
            GmsError: It has ended; this is what it said.
            EngineFailed: An engine ends again and again before it is ready.
        """
        if self._group is not None and self._group.first_has_exited:
            group, self._group = self._group, None
            while not group.settle():
                time.sleep(SETTLE_S)
            raise _said(group.log, how(group.reap()))
        for engine, (failures, why) in failed_starts(_lines(self._log_dir / RUN_LOG)).items():
            if failures >= MOST_FAILURES:
                line = last_line(self._log_dir / f"{engine}.log")
                raise EngineFailed(
                    f"{engine} has failed to start {failures} times in a row; it {why.partition(';')[0]}", hint=f"Its log ends with: {line}"
                )

    def promotion_since(self, since_s: float) -> Promotion | None:
        """The first promotion after an instant on the monotonic clock, as the logs of the engines tell; None if they do not."""
        logs = (path.read_text(errors="replace") for path in self._log_dir.glob(f"{NAME}-*.log"))
        found = [promotion for log in logs for promotion in promotions(log) if promotion.elected_s >= since_s]
        return min(found, key=lambda promotion: promotion.elected_s, default=None)

    def last_lines(self) -> str:
        """The end of each engine's log."""
        return "; ".join(f"{path.name}: {last_line(path)}" for path in sorted(self._log_dir.glob(f"{NAME}-*.log")))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._group is None:
            return
        # The first signal ends engines and servers in order, the second one kills them; then there is nothing left to wait for.
        group = self._group
        for _ in range(2):
            group.ask_to_end(END_S)
            deadline = time.monotonic() + END_S / 2
            while not group.first_has_exited and time.monotonic() < deadline:
                time.sleep(SETTLE_S)
        while not group.settle():
            time.sleep(SETTLE_S)
        group.reap()


def _lines(log: Path) -> list[str]:
    """The whole lines of a log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _said(log: Path, ending: str) -> GmsError:
    line = last_line(log)
    try:
        failure = json.loads(line)["error"]
        return rebuild(failure["code"], failure["message"], failure["hint"], failure["details"])
    except (ValueError, KeyError, TypeError):
        return EngineFailed(f"gms run {ending}: {line}", hint=f"Look at {log}.")


def kinds(engine: Engine) -> list[Kind]:
    """What of an engine can be killed: not every engine has all of these processes."""
    return [kind for kind in KINDS if kind == "group" or any(member.process.startswith(_PARTS[kind]) for member in engine.members)]


def kill(engine: Engine, kind: Kind, choice: random.Random) -> float:
    """Kill a part of an engine, or all of it; returns when, on the monotonic clock.

    Args:
        engine: Which.
        kind: What of it.
        choice: Chooses among several processes of a kind.

    Raises:
        EngineFailed: It has no such process.
    """
    if kind == "group":
        groups = {os.getpgid(member.pid) for member in engine.members} - {os.getpgrp()}
        killed = time.monotonic()
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        return killed
    for name in _PARTS[kind]:
        found = sorted(member.pid for member in engine.members if member.process.startswith(name))
        if found:
            pid = choice.choice(found)
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            return killed
    listing = ", ".join(member.process for member in engine.members)
    raise EngineFailed(f"{engine.name} has no process that is its {kind}; it has: {listing}")
