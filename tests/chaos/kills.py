"""The ways to die: what is killed, when, and what has to be so afterwards."""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.fleet import GROUP, Fleet, Life, StuckError
from chaos.leftovers import WEIGHTS
from chaos.load import Load, Probe
from chaos.squatter import squatting
from gms_core.fleet.engines import engines
from gms_core.protocol.messages import StatusReport

QUIET_S = 5.0
"""Seconds after a kill in which no new engine is started, so that the time until somebody serves is not that of a machine that loads engines."""
LONG_S = 240.0
GO_ON_S = 20.0
"""Seconds after the end of a server, or of a keeper, in which another one has taken its place."""
DELAY_S = 1.0
"""Seconds from the moment at which a kill is possible to the kill, at most."""


@dataclass
class Blow:
    """One kill.

    Attributes:
        kind: Of `KINDS`.
        victim: The engine, or ``server`` or ``keeper``.
        part: What of it was killed.
        role: What it was.
        recovered_s: Seconds until somebody answered a request that was made after the kill; None if that says nothing about this kind.
        serves: Who was the primary afterwards.
    """

    kind: str
    victim: str
    part: str
    role: str
    recovered_s: float | None = None
    serves: str = ""


@dataclass
class Scene:
    """Everything that a kill needs.

    Attributes:
        chance: Decides what is left to chance.
        blows: All kills so far.
    """

    fleet: Fleet
    load: Load
    chance: random.Random
    blows: list[Blow] = field(default_factory=list)

    def moment(self, most_s: float = DELAY_S) -> None:
        """Let a random time pass."""
        until = time.monotonic() + self.chance.uniform(0.0, most_s)
        self.fleet.until(lambda: time.monotonic() >= until, "time passes")

    def primary(self) -> Life:
        """The engine that serves, once all of its processes are known.

        Raises:
            StuckError: There is none.
        """
        found: list[Life] = self.fleet.until(lambda: self.fleet.whole("primary"), "an engine serves")
        return found[0]

    def standby(self, count: int = 1) -> list[Life]:
        """That many shadows, or more."""
        found: list[Life] = self.fleet.until(
            lambda: shadows if len(shadows := self.fleet.whole("standby")) >= count else None, f"{count} engines stand by"
        )
        return found

    def strike(self, kind: str, life: Life, part: str, number: signal.Signals = signal.SIGKILL) -> tuple[Blow, float]:
        """Kill, or stop; returns when, too."""
        role = self.fleet.seen()[life.name].role if life.name in self.fleet.seen() else "init"
        at = self.fleet.kill(life, part, number)
        blow = Blow(kind, life.name, part if number is signal.SIGKILL else f"{part} stopped", role)
        self.blows.append(blow)
        return blow, at

    def until_served(self, blow: Blow, at: float) -> None:
        """Somebody answers again, and is the only primary."""
        probe = Probe(self.load, at, LONG_S)
        probe.join(QUIET_S)
        self.fleet.until(lambda: not probe.is_alive(), "the port answers again")
        if probe.seconds is None:
            raise StuckError(f"nobody answered within {LONG_S:g} s of {blow}")
        blow.recovered_s = probe.seconds
        blow.serves = self.primary().name


def kill_primary(part: str, number: signal.Signals = signal.SIGKILL) -> Callable[[Scene, str], None]:
    """Kill the engine that serves."""

    def kill(scene: Scene, kind: str) -> None:
        scene.standby()
        primary = scene.primary()
        scene.moment()
        blow, at = scene.strike(kind, primary, part, number)
        scene.until_served(blow, at)
        scene.fleet.until_gone(primary)

    return kill


def kill_shadow(number: signal.Signals = signal.SIGKILL) -> Callable[[Scene, str], None]:
    """Kill some process of an engine that stands by: the primary serves on."""

    def kill(scene: Scene, kind: str) -> None:
        part = scene.chance.choice(scene.fleet.parts)
        scene.standby()
        scene.moment()
        primary = scene.primary()
        shadow = scene.chance.choice(sorted(scene.standby(), key=lambda life: life.name))
        blow, at = scene.strike(kind, shadow, part, number)
        scene.until_served(blow, at)
        _same(primary, blow)
        blow.recovered_s = None
        scene.fleet.until_gone(shadow)

    return kill


def kill_starting(scene: Scene, kind: str) -> None:
    """Kill some process of an engine that is being loaded, warmed up, or has only just been started: the primary serves on."""
    early = scene.chance.random() < 0.3
    part = scene.chance.choice(scene.fleet.parts)
    delay_s = scene.chance.uniform(0.0, 5.0)
    primary = scene.primary()
    life = (scene.fleet.starting() or [scene.fleet.start()])[-1]
    joined = lambda: life.name in scene.fleet.seen() or life not in scene.fleet.lives  # noqa: E731
    if early:
        until = time.monotonic() + delay_s
        scene.fleet.until(lambda: time.monotonic() >= until or joined(), "time passes")
    else:
        scene.fleet.until(joined, f"{life.name} has joined its cohort")
        scene.moment(0.5)
    if life not in scene.fleet.lives:
        raise StuckError(f"{life.name} has ended by itself")
    try:
        blow, at = scene.strike(kind, life, part)
    except StuckError:  # that part has not joined yet, as it is so early
        blow, at = scene.strike(kind, life, GROUP)
    scene.until_served(blow, at)
    _same(primary, blow)
    blow.recovered_s = None
    scene.fleet.until_gone(life)


def kill_promoting(scene: Scene, kind: str) -> None:
    """Kill the primary, and the elected engine while it waits for the memory, which somebody else holds: the shadow after that one serves."""
    parts = scene.chance.choice(scene.fleet.parts), scene.chance.choice(scene.fleet.parts)
    scene.standby(2)
    primary = scene.primary()
    report = scene.fleet.report()
    assert report is not None
    with squatting(scene.fleet.story.server.socket, f"squatter-{secrets.token_hex(4)}", report.retained[0]) as squatter:
        first, _ = scene.strike(kind, primary, parts[0])
        squatter.until_it("holds")
        promoting = scene.fleet.until(lambda: scene.fleet.whole("promoting"), "an engine is elected")[0]
        scene.moment(0.5)
        blow, at = scene.strike(kind, promoting, parts[1])
        scene.fleet.until(lambda: scene.fleet.whole("promoting"), "the next engine is elected")
        squatter.end()
    scene.until_served(blow, at)
    first.serves, blow.recovered_s = blow.serves, None
    scene.fleet.until_gone(primary)
    scene.fleet.until_gone(promoting)


def kill_two(scene: Scene, kind: str) -> None:
    """Kill the primary, and after a moment whoever has been elected in its place, promoted or not."""
    parts = scene.chance.choice(scene.fleet.parts), scene.chance.choice(scene.fleet.parts)
    delay_s = scene.chance.uniform(0.0, 0.4)
    scene.standby(2)
    primary = scene.primary()
    _, at = scene.strike(kind, primary, parts[0])
    elected = scene.fleet.until(
        lambda: [life for life in scene.fleet.lives if not life.doomed and life.name == owner(scene.fleet.report())], "an engine is elected"
    )[0]
    time.sleep(max(0.0, at + delay_s - time.monotonic()))
    blow, at = scene.strike(kind, elected, parts[1])
    scene.until_served(blow, at)
    scene.fleet.until_gone(primary)
    scene.fleet.until_gone(elected)


def kill_server(scene: Scene, kind: str) -> None:
    """Kill the device's server: the one that follows goes on with all memory and all engines, and none of them notices."""
    _nobody_notices(scene, kind, "server", scene.fleet.story.server.kill)


def kill_keeper(scene: Scene, kind: str) -> None:
    """Kill the process that keeps the memory beside the server: another one is given all of it, and no engine notices."""
    server = scene.fleet.story.server
    (keeper,) = server.keepers
    _nobody_notices(scene, kind, "keeper", lambda: os.kill(keeper, signal.SIGKILL))
    scene.fleet.until(lambda: set(server.keepers) - {keeper}, "there is another keeper", GO_ON_S)


def lose_everything(scene: Scene, kind: str) -> None:
    """Kill the server and its keeper: the primary serves on and joins the server that follows, which has nothing, and every shadow ends."""
    scene.standby()
    scene.moment()
    primary = scene.primary()
    shadows = [life for life in scene.fleet.lives if life is not primary]
    for life in shadows:
        ready = life.name in {seen.name for seen in scene.fleet.having("standby")}
        life.doomed, life.must_end = life.doomed or "its server was lost", bool(life.doomed) or ready
        life.files |= life.running.named_memory()
    at = time.monotonic()
    scene.fleet.story.server.lose_everything()
    blow = Blow(kind, "server", "server and keeper", "server")
    scene.blows.append(blow)
    scene.until_served(blow, at)
    blow.recovered_s = None
    _same(primary, blow)
    for life in shadows:
        if life.dying:  # one that was only starting may stand by already, and is no longer expected to end
            scene.fleet.until_gone(life)


def kill_writer(scene: Scene, kind: str) -> None:
    """Kill some process of the engine that is about to publish the weights: another one does that instead."""
    part = scene.chance.choice(scene.fleet.parts)
    serves = scene.fleet.having("primary")

    def writer() -> Life | None:
        report = scene.fleet.report()
        pids = {session.pid for session in report.sessions if session.leases.get(WEIGHTS) == "write"} if report is not None else set()
        return next((life for life in scene.fleet.lives if not life.doomed and pids & set(life.running.pids())), None)

    def published() -> bool:
        report = scene.fleet.report()
        return report is not None and any(pool.name == WEIGHTS and pool.generation for pool in report.pools)

    life = scene.fleet.until(lambda: writer() or published(), "an engine loads the weights")
    if not isinstance(life, Life):
        kill_starting(scene, kind)  # too late: they are published
        return
    try:
        blow, at = scene.strike(kind, life, part)
    except StuckError:
        blow, at = scene.strike(kind, life, GROUP)
    scene.fleet.until_gone(life)
    scene.until_served(blow, at)
    blow.recovered_s = None
    if serves:
        _same(serves[0], blow)


def owner(report: StatusReport | None) -> str:
    """Name of the engine that has the lock."""
    names = {cohort.name: cohort.engine for cohort in report.cohorts} if report is not None else {}
    return next((names.get(lock.owner, "") for lock in report.locks), "") if report is not None else ""


def _nobody_notices(scene: Scene, kind: str, victim: str, strike: Callable[[], None]) -> None:
    """Kill a process that is no engine's: all engines go on, whatever they are, and with them all memory."""
    scene.standby()
    scene.moment()
    primary = scene.primary()
    lives = [life for life in scene.fleet.lives if not life.doomed]
    report = scene.fleet.report()
    assert report is not None
    before = facts(report)
    at = time.monotonic()
    strike()
    blow = Blow(kind, victim, victim, victim)
    scene.blows.append(blow)

    def goes_on() -> bool:
        now = scene.fleet.report()
        return now is not None and not different(before, facts(now))

    try:
        scene.fleet.until(goes_on, f"everything is as it was before {blow}", GO_ON_S)
    except StuckError as error:
        now = scene.fleet.report()
        raise StuckError(f"{error}: {different(before, facts(now)) if now is not None else 'the server does not answer'}") from None
    scene.until_served(blow, at)
    blow.recovered_s = None
    _same(primary, blow)
    if lost := [life.name for life in lives if life not in scene.fleet.lives or life.doomed]:
        raise StuckError(f"{lost} had to go on after {blow}")


def facts(report: StatusReport) -> dict[str, object]:
    """What a server's end changes nothing of, by what it is about: engines that are ready, who is elected, and the memory."""
    found: dict[str, object] = {
        f"engine {engine.name}": (engine.cohort, engine.standing, sorted(member.pid for member in engine.members))
        for engine in engines([report])
        if engine.standing in ("standby", "primary")
    }
    found |= {f"lock {lock.name}": (lock.term, lock.owner) for lock in report.locks}
    found |= {f"pool {pool.name}": (pool.generation, pool.digest, pool.bytes) for pool in report.pools}
    found |= {f"pool {pool.name}": (pool.epoch, pool.holder, pool.bytes) for pool in report.retained}
    return found | {"bytes": report.allocated_bytes, "allocations": report.allocations}


def different(before: dict[str, object], now: dict[str, object]) -> dict[str, tuple[object, object]]:
    """What is not as it was. An engine that has become ready since is no difference."""
    return {name: (fact, now.get(name)) for name, fact in before.items() if now.get(name) != fact}


def _same(primary: Life, blow: Blow) -> None:
    if blow.serves != primary.name:
        raise StuckError(f"{primary.name} had to serve on, but {blow.serves} does, after {blow}")


PARTS = (GROUP, "api-server 0", "engine-core", "rank 0", "detokenizer")
"""Of any engine."""
KINDS: dict[str, Callable[[Scene, str], None]] = {
    **{f"kill {part}": kill_primary(part) for part in PARTS},
    **{f"stop {part}": kill_primary(part, signal.SIGSTOP) for part in PARTS},
    "kill shadow": kill_shadow(),
    "stop shadow": kill_shadow(signal.SIGSTOP),
    "kill starting": kill_starting,
    "kill promoting": kill_promoting,
    "kill two": kill_two,
    "kill server": kill_server,
    "kill keeper": kill_keeper,
    "lose everything": lose_everything,
    "kill writer": kill_writer,
}
