"""Keeps the wanted number of engines alive on a node: starts them, ends what is left of the dead, and starts those again as shadows."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_core.errors import EngineFailed
from gms_core.exit_words import how
from gms_core.fleet.engines import Engine, engines
from gms_core.fleet.groups import Group, last_line, session_of
from gms_core.fleet.own_server import OwnServer
from gms_core.fleet.restarts import GiveUp, Policy, Seen, Start, ended, new_fleet, next_step, observed, started
from gms_core.fleet.restoring import Restoring
from gms_core.fleet.view import Change, EngineRow, FleetView
from gms_core.fleet.watcher import Watcher
from gms_core.protocol.messages import StatusReport
from gms_core.stop_signals import stop_signals

CLIENT = "gms run"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends it."""
ASK_S = 0.25
LOST_S = 5.0
"""Seconds after which an engine that its servers do not know any more is none of theirs."""
SETTLE_S = 0.05
"""Seconds between two looks at an engine that is ending: of its processes only the first one can be waited for."""
KILLED_S = 60.0
"""Seconds after which a process that was killed and is still there is reported: it hangs in the kernel."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to keep alive.

    Attributes:
        command: Of the engine of a number.
        environment: Of the engine of a number, and of the server if that is None.
        name: What the engines are called, less their number.
        engines: How many there are to be, one of which becomes the primary.
        lock: That they have in common, such as ``gms:primary``.
        runtime_dir: Of the servers.
        devices: Whose servers have to answer; empty for any.
        serve: Command that starts them; None if they are somebody else's.
        log_dir: Where the output of each engine goes, in a file of its own.
        policy: When to start what.
        stop_timeout_s: Seconds that an engine gets to end by itself.
        restore: Command that publishes what engines need, before they start and when a server has come back; None if there is nothing to do.
    """

    command: Callable[[int], Sequence[str]]
    environment: Callable[[int | None], Mapping[str, str]]
    name: str
    engines: int
    lock: str
    runtime_dir: Path
    devices: tuple[str, ...]
    serve: tuple[str, ...] | None
    log_dir: Path
    policy: Policy
    stop_timeout_s: float
    restore: tuple[str, ...] | None = None


def supervise(wanted: Wanted, on_change: Callable[[Change], None], on_tick: Callable[[list[EngineRow]], None]) -> None:
    """Keep engines alive until SIGINT, SIGTERM or SIGHUP, then end them and, if it was started for them, the server; a second signal kills.

    Args:
        wanted: What to keep alive.
        on_change: Called with each change.
        on_tick: Called with the state of all engines, several times a second.

    Raises:
        EngineFailed: Engines end again and again, or cannot be started, and none serves; or one cannot be ended.
        ServerUnavailable: The server cannot be started.
    """
    view = FleetView(on_change, on_tick)
    with contextlib.ExitStack() as stack:
        # One that is ignored stays so: nohup ignores SIGHUP.
        told = stack.enter_context(stop_signals(number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN))
        watcher = stack.enter_context(Watcher(wanted.runtime_dir, CLIENT, ASK_S))
        log = wanted.log_dir / "server.log"
        server = OwnServer(wanted.serve, wanted.environment(None), log, lambda state, detail: view.tell(Change("server", state, detail)))
        stack.callback(server.end)
        log = wanted.log_dir / "restore.log"
        restoring = Restoring(wanted.restore, wanted.environment(None), log, lambda state, detail: view.tell(Change("restore", state, detail)))
        stack.callback(restoring.end)
        fleet = _Supervisor(wanted, view, watcher, server, restoring, told)
        stack.callback(fleet.end)
        fleet.run()


@dataclass(frozen=True, slots=True)
class _Exit:
    """How an engine's life ended."""

    how: str
    log: Path
    cohort: str


class _Supervisor:
    def __init__(self, wanted: Wanted, view: FleetView, watcher: Watcher, server: OwnServer, restoring: Restoring, told: socket.socket) -> None:
        self._wanted, self._view, self._watcher, self._server, self._told = wanted, view, watcher, server, told
        self._restoring = restoring
        self._fleet = new_fleet(())
        self._groups: dict[int, Group] = {}
        self._found: dict[int, Engine] = {}
        self._cohorts: dict[int, str] = {}
        self._exits: dict[int, _Exit] = {}
        self._joined: dict[int, frozenset[str]] = {}
        self._unknown_since: dict[int, float] = {}
        self._faults: dict[int, str] = {}
        self._reasons: dict[str, str] = {}
        self._heard = 0
        self._ending = False

    def run(self) -> None:
        while not self._signals():
            reports = self._watcher.reports()
            devices = {report.device for report in reports}
            self._server.observe(answers=bool(devices) and devices >= set(self._wanted.devices))
            self._restoring.observe(server_up=self._server.up)
            self._take_in(reports)
            self._end_hanging()
            self._bury()
            until = self._act()
            self._view.show(self._states())
            self._wait(until - time.monotonic())

    def _signals(self) -> int:
        """How many signals have come so far that tell it to stop; a terminal that closes after Ctrl-C is no second one."""
        with contextlib.suppress(BlockingIOError):
            heard = self._told.recv(64)
            self._heard += sum(1 for number in heard if number != signal.SIGHUP or not self._heard)
        return self._heard

    def _wait(self, seconds: float) -> None:
        """Wait until something happens, at most so long."""
        poll = select.poll()
        ending = self._ending or self._restoring.ending
        if self._restoring.pidfd >= 0:
            poll.register(self._restoring.pidfd, select.POLLIN)
        for group in self._groups.values():
            exited = group.first_has_exited
            ending = ending or exited or group.asked
            if not exited:
                poll.register(group.pidfd, select.POLLIN)
        poll.register(self._told, select.POLLIN)
        poll.register(self._watcher.news, select.POLLIN)
        poll.poll(1000 * max(0.0, min(seconds, SETTLE_S if ending else ASK_S)))

    def _take_in(self, reports: Sequence[StatusReport]) -> None:
        found = engines(reports)
        self._reasons = {end.cohort: end.reason for report in reports for end in report.ends}
        if not self._fleet.places and reports:
            self._fleet = new_fleet(_free_numbers(self._wanted.name, self._wanted.engines, found))
        self._found = dict(self._own(found))
        self._cohorts |= {number: engine.cohort for number, engine in self._found.items()}
        self._joined |= {number: frozenset(engine.devices) for number, engine in self._found.items()}
        seen = {number: Seen(engine.role, engine.role_age_s, engine.state == "fencing") for number, engine in self._found.items()}
        own = {engine.cohort for engine in self._found.values()}
        # Each server has locks of its own: one of the same name on another device elects engines of another fleet.
        devices = frozenset().union(*self._joined.values()) or self._wanted.devices
        near = [report for report in reports if report.device in devices]
        elsewhere = any(_has_lock(engine, self._wanted.lock, near) for engine in found if engine.cohort not in own)
        lost = self._lost({report.device for report in reports})
        self._fleet = observed(self._fleet, seen, self._wanted.policy, primary_elsewhere=elsewhere, lost=lost)

    def _lost(self, answering: set[str]) -> list[int]:
        """Engines that no server knows any more although all those that they had joined have answered for a while."""
        now = time.monotonic()
        unknown = [number for number in self._cohorts if number not in self._found and self._joined[number] <= answering]
        self._unknown_since = {number: self._unknown_since.get(number, now) for number in unknown}
        return [number for number, since in self._unknown_since.items() if now - since >= LOST_S]

    def _own(self, found: Iterable[Engine]) -> Iterator[tuple[int, Engine]]:
        """The engines that were started here: known by the session of their processes, or, if those have left it, by name and age."""
        sessions = {engine.cohort: {session_of(member.pid) for member in engine.members} for engine in found}
        for number, group in self._groups.items():
            age = time.monotonic() - group.started_at
            mine = [engine for engine in found if group.pid in sessions[engine.cohort]]
            mine = mine or [engine for engine in found if engine.name == self._name(number) and engine.age_s <= age]
            if mine:
                yield number, min(mine, key=lambda engine: engine.age_s)

    def _end_hanging(self) -> None:
        """End engines of which nothing will become: while one starts, no other is started."""
        patience_s = self._wanted.policy.start_timeout_s
        for place in self._fleet.places:
            group = self._groups.get(place.number)
            if group is None or group.asked or group.first_has_exited or not place.starting:
                continue
            if place.number in self._cohorts and place.seen is None:
                self._faults[place.number] = "its server does not know it any more"
            elif time.monotonic() - group.started_at >= patience_s:
                self._faults[place.number] = f"it was not ready within {patience_s:g} s"
            else:
                continue
            group.ask_to_end(self._wanted.stop_timeout_s)

    def _bury(self) -> None:
        """End what is left of engines whose first process has ended or was asked to, and forget those of which nothing is left."""
        for number, group in list(self._groups.items()):
            if (group.first_has_exited or group.asked) and group.settle():
                del self._groups[number]
                code, fault = group.reap(), self._faults.pop(number, "")
                self._exits[number] = _Exit(f"{how(code)}{f': {fault}' if fault else ''}", group.log, self._cohorts.pop(number, ""))
                self._found.pop(number, None)
                self._fleet = ended(self._fleet, number, time.monotonic(), self._wanted.policy, code)

    def _act(self) -> float:
        """Start what is to be started; returns when there may be more to do, on the monotonic clock."""
        step = next_step(self._fleet, time.monotonic(), self._wanted.policy, server_up=self._server.up and self._restoring.done)
        if isinstance(step, GiveUp):
            raise self._failure(step)
        if not isinstance(step, Start):
            return step.until
        name, command = self._name(step.number), list(self._wanted.command(step.number))
        heading = f"start {self._fleet.place(step.number).lives + 1} of {name}: {' '.join(command)}"
        log = self._wanted.log_dir / f"{name}.log"
        self._fleet = started(self._fleet, step.number)
        try:
            self._groups[step.number] = Group(command, self._wanted.environment(step.number), log, heading)
        except EngineFailed as error:  # a full disk is no reason to end those that serve
            self._exits[step.number] = _Exit(f"was not started: {error.message}", log, "")
            self._fleet = ended(self._fleet, step.number, time.monotonic(), self._wanted.policy)
        return time.monotonic()

    def _name(self, number: int) -> str:
        return f"{self._wanted.name}-{number}"

    def _failure(self, step: GiveUp) -> EngineFailed:
        last = max((place for place in self._fleet.places if place.number in self._exits), key=lambda place: place.due)
        log, line = self._exits[last.number].log, last_line(self._exits[last.number].log)
        what = f"{self._name(last.number)} {self._exits[last.number].how}"
        return EngineFailed(
            f"{what}, as programs do whose command line is wrong"
            if step.refused
            else f"{step.failures} starts in a row have failed and no engine serves; {what}",
            hint=f"Look at {log}" + (f"; it ends with: {line}" if line else "."),
            details={"log": str(log), "last_line": line},
        )

    def _ending_of(self, number: int) -> str:
        """How the last life of an engine ended, with the server's reason as soon as it is known."""
        exit_ = self._exits.get(number)
        if exit_ is None:
            return ""
        reason = self._reasons.get(exit_.cohort, "")
        return f"{exit_.how}{f': {reason}' if reason else ''}; log: {exit_.log}"

    def _states(self) -> Iterator[EngineRow]:
        now = time.monotonic()
        for place in self._fleet.places:
            group, engine = self._groups.get(place.number), self._found.get(place.number)
            state, age, detail = "waiting", 0.0, "" if group is not None else self._ending_of(place.number)
            if group is not None and (group.asked or group.first_has_exited):
                state, detail = "ending", self._faults.get(place.number, "" if group.asked else "its first process has ended")
            elif engine is not None:
                state, age = engine.standing, engine.role_age_s
                detail = engine.reason or engine.detail or (f"told to {engine.order}" if engine.order else "")
            elif group is not None:
                state = "starting" if place.seen is None else place.seen.role  # as long as its server does not answer: what it was
            yield EngineRow(
                name=self._name(place.number),
                state="ended" if self._ending and group is None else state,
                state_age_s=age,
                pid=0 if group is None else group.pid,
                epoch=0 if engine is None else engine.epoch,
                restarts=max(0, place.lives - 1),
                detail=detail,
                starts_in_s=max(0.0, place.due - now) if group is None and not self._ending else 0.0,
            )

    def end(self) -> None:
        """End all engines: the shadows first, so that none of them takes over from a primary that is told to end."""
        self._ending = True
        primary = {place.number for place in self._fleet.places if place.primary}
        shadows = set(self._groups) - primary
        self._ask_to_end(shadows)
        self._view.tell(Change("run", "ending", "Ctrl-C again kills at once"))
        heard = self._heard
        stuck = self._until_ended(shadows, heard)
        self._ask_to_end(primary)
        stuck += self._until_ended(primary, heard)
        if stuck:
            raise EngineFailed(
                f"processes {', '.join(map(str, stuck))} were killed {KILLED_S:g} s ago and are still there",
                hint="They hang in the kernel: look at dmesg, and at the GPU's driver.",
            )

    def _ask_to_end(self, numbers: Iterable[int]) -> None:
        for number in self._groups.keys() & set(numbers):
            self._groups[number].ask_to_end(self._wanted.stop_timeout_s)

    def _until_ended(self, wave: set[int], heard: int) -> list[int]:
        """Wait for the end of engines that were asked; returns the processes that survive to be killed."""
        self._view.show(self._states())
        while groups := [self._groups[number] for number in self._groups.keys() & wave]:
            if self._signals() > heard or heard > 1:
                for group in self._groups.values():
                    if group.killed_for_s < 0:
                        group.kill()
            self._take_in(self._watcher.reports())
            self._bury()
            self._view.show(self._states())
            self._wait(SETTLE_S)
            if stuck := [pid for group in groups if group.killed_for_s > KILLED_S for pid in group.living()]:
                return stuck
        return []


def _free_numbers(name: str, wanted: int, found: Iterable[Engine]) -> tuple[int, ...]:
    """The lowest numbers whose engines do not exist: those of a run that was killed may still serve."""
    taken = {engine.name for engine in found}
    free = (number for number in range(wanted + len(taken)) if f"{name}-{number}" not in taken)
    return tuple(next(free) for _ in range(wanted))


def _has_lock(engine: Engine, lock: str, reports: Iterable[StatusReport]) -> bool:
    """Whether an engine serves by this lock; only a server's own locks can be seen."""
    kind, _, name = lock.partition(":")
    owners = {status.owner for report in reports for status in report.locks if status.name == name}
    return kind == "gms" and engine.cohort in owners and engine.standing == "primary"
