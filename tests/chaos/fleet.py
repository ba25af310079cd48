"""A primary and shadows of real engines on one port: the dead are replaced, and whoever ends without having been killed is noticed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from failover_story import PATIENCE_S, Running, Story

from chaos.warden import Warden
from gms_core.client import Session
from gms_core.errors import GmsError
from gms_core.fleet.engines import Engine, engines
from gms_core.protocol.messages import Role, StatusReport

LOOK_S = 0.02
NAMES_S = 10.0
"""Seconds after the end of an engine in which the names of its shared memory have to be gone."""
GROUP = "group"
"""All processes of an engine at once."""


class StuckError(Exception):
    """What had to happen did not."""


@dataclass
class Life:
    """One engine, from its start to its last process.

    Attributes:
        doomed: Why it is expected to end; empty if it is not.
        must_end: Whether it has to end then. If not, it has outlived its doom once it stands by.
        last: What it was when it was last seen.
        yields: Whether its rank gives way to others.
        files: Names of shared memory that its processes had mapped.
        ended_at: When its first process was found ended, on the monotonic clock; 0 before.
    """

    running: Running
    started: float
    context: contextlib.ExitStack
    doomed: str = ""
    must_end: bool = True
    last: Role = "init"
    yields: bool = False
    files: set[str] = field(default_factory=set)
    ended_at: float = 0.0

    @property
    def name(self) -> str:
        return self.running.name

    @property
    def dying(self) -> bool:
        """Whether it is sure to end. Looked at anew each time: one that outlives its doom is not."""
        return bool(self.doomed) and self.must_end


class Fleet:
    """Engines that stand in for one another.

    Args:
        story: Where they run.
        port: Where the primary listens.
        warden: Knows them too, in case this process is killed.
        at_once: How many engines may be starting at the same time.
        failover: Further keys of the failover block.
        nice: How far a primary's rank gives way to others. VLLM's looks for its next step without a pause for a second after each, which on a machine
            with few processors would be taken from the engines that start.

    Attributes:
        starts: Engines that were started so far.
        shadows: How many shadows there are to be; -1 if no engine is to be started any more.
        lives: Those of which anything is left.
        unexpected: Ends of engines that nobody had killed.
        left: What dead engines have left behind.
    """

    def __init__(self, story: Story, port: int, warden: Warden, *, at_once: int, failover: dict[str, Any], temporary: str, nice: int = 0) -> None:
        self.story = story
        self.starts = 0
        self.shadows = 0
        self.lives: list[Life] = []
        self.unexpected: list[str] = []
        self.left: list[str] = []
        self._port, self._warden, self._at_once = port, warden, at_once
        self._failover, self._nice = failover, nice
        self._environment = {"TMPDIR": temporary, "VLLM_RPC_BASE_PATH": temporary}
        self._session: Session | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for life in self.lives:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(life.running.process.pid, signal.SIGKILL)
        for life in self.lives:
            life.context.close()
        self.lives.clear()
        if self._session is not None:
            self._session.close()

    # What there is

    @property
    def parts(self) -> tuple[str, ...]:
        """What of an engine can be killed: all of its processes at once, or one of them, by the name with which it has joined its cohort."""
        return (GROUP, *self.story.parts)

    def report(self) -> StatusReport | None:
        """What the server says; None if it does not answer."""
        try:
            self._session = self._session or self.story.server.connect("fleet")
            return self._session.status()
        except GmsError:
            if self._session is not None:
                self._session.close()
            self._session = None
            return None

    def seen(self) -> dict[str, Engine]:
        """The engines, by name, as the server knows them."""
        report = self.report()
        return {} if report is None else {engine.name: engine for engine in engines([report])}

    def having(self, *roles: Role) -> list[Life]:
        """Engines that have one of these roles, and that nobody has killed."""
        found = self.seen()
        lives = [life for life in self.lives if not life.doomed and life.name in found]
        return [life for life in lives if found[life.name].standing in roles]

    def whole(self, *roles: Role) -> list[Life]:
        """Such engines all of whose processes have joined, so that any of them can be named."""
        found = self.seen()
        return [life for life in self.having(*roles) if life.name in found and set(self.story.parts) <= parts(found[life.name]).keys()]

    def starting(self) -> list[Life]:
        """Engines that are on their way to be a shadow."""
        return [life for life in self.lives if not life.doomed and life.last == "init"]

    # What happens to them

    def kill(self, life: Life, part: str, number: signal.Signals = signal.SIGKILL) -> float:
        """Send a signal to a part of an engine, which is doomed from now on; returns when, on the monotonic clock.

        Raises:
            StuckError: There is no such process.
        """
        pid = life.running.process.pid
        if part != GROUP:
            engine = self.seen().get(life.name)
            members = {} if engine is None else parts(engine)
            if part not in members:
                raise StuckError(f"{life.name} has no process {part}: {sorted(members)}")
            pid = members[part]
        life.doomed, life.must_end = f"{number.name} of {part}", True
        life.files |= life.running.named_memory()
        now = time.monotonic()
        os.killpg(pid, number) if part == GROUP else os.kill(pid, number)
        return now

    def start(self) -> Life:
        """Start one more engine."""
        self.starts += 1
        context = contextlib.ExitStack()
        engine = self.story.engine(f"engine-{self.starts}", "--port", str(self._port), failover=self._failover, environment=self._environment)
        started = time.monotonic()
        life = Life(context.enter_context(engine), started, context)
        self._warden.watch(life.running.process.pid)
        self.lives.append(life)
        return life

    def tend(self) -> None:
        """Bury the dead, and start engines in their place."""
        found = self.seen()
        for life in list(self.lives):
            if life.name in found:
                life.last = found[life.name].role
                if self._nice and life.last == "primary" and not life.yields:
                    self._give_way(life, found[life.name])
                if not life.must_end and life.last in ("standby", "promoting", "primary"):
                    life.doomed, life.must_end = "", True
            if life.running.process.poll() is not None:
                self._ended(life)
        living = [life for life in self.lives if not life.dying]
        if len(living) <= self.shadows and len(self.starting()) < self._at_once:
            self.start()

    def _give_way(self, life: Life, engine: Engine) -> None:
        """Let a primary's rank use what others leave of the processors."""
        if (pid := parts(engine).get("rank 0")) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, pid, self._nice)
            life.yields = True

    def _ended(self, life: Life) -> None:
        """The first process of an engine has ended: nothing else may be left of it soon."""
        if not life.doomed:
            life.doomed = "it ended by itself"
            self.unexpected.append(f"{life.name}, {life.last}, ended with {life.running.process.returncode}:\n{life.running.tail()}")
        now = time.monotonic()
        life.ended_at = life.ended_at or now
        left = [name for name in life.files if os.path.exists(f"/dev/shm/{name}")]
        if life.running.pids() or (left and now - life.ended_at < NAMES_S):
            return
        self.left += [f"{life.name} has left /dev/shm/{name}" for name in left]
        self.lives.remove(life)
        life.context.close()

    def until(self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        """The first true value of a condition; meanwhile the dead are replaced.

        Raises:
            StuckError: It never had one.
        """
        deadline = time.monotonic() + patience_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                roles = ", ".join(f"{life.name} {life.last} {life.doomed}" for life in self.lives)
                raise StuckError(f"waited {patience_s:g} s in vain: {what}; engines: {roles}")
            self.tend()
            time.sleep(LOOK_S)
        return value

    def until_gone(self, life: Life) -> None:
        """Wait until nothing of a killed engine is left; what is left for too long is noted, and ended."""
        try:
            self.until(lambda: life not in self.lives, f"{life.name} is not gone after {life.doomed}", PATIENCE_S / 2)
        except StuckError as error:
            self.left.append(f"{error}: {life.running.pids()}")
            self.lives.remove(life)
            life.context.close()


def parts(engine: Engine) -> dict[str, int]:
    """Process numbers of an engine's processes by the name with which they joined; a process that joined twice is there once."""
    return {member.process.split(" (")[0]: member.pid for member in engine.members}
