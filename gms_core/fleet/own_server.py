"""The server that `gms run` starts because none runs: started again when it ends, and ended last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gms_core.errors import EngineFailed, ServerUnavailable
from gms_core.exit_words import how
from gms_core.fleet.groups import Group, last_line

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0
STOP_S = 15.0
"""Seconds that it gets to end by itself: more than it gives its device servers."""


class OwnServer:
    """A server, ours or somebody else's, as a fleet needs it.

    Args:
        command: What starts it; None if it is somebody else's.
        environment: For the command.
        log: Where its output goes.
        tell: Called with its state and a reason, each time that it changes.

    Attributes:
        up: Whether it answers.
    """

    def __init__(self, command: Sequence[str] | None, environment: Mapping[str, str], log: Path, tell: Callable[[str, str], None]) -> None:
        self.up = False
        self._command, self._environment, self._log, self._tell = command, environment, log, tell
        self._group: Group | None = None
        self._was_up = False
        self._due = 0.0
        self._delay_s = FIRST_DELAY_S

    def observe(self, *, answers: bool) -> None:
        """Note whether it answers, and start it if it is ours and is not there.

        Raises:
            ServerUnavailable: It has ended without ever being up: another try would end in the same way.
            EngineFailed: Its command cannot be started, and it has never been up.
        """
        if answers != self.up:
            self.up = answers
            self._tell("up" if answers else "lost", "" if answers else "it does not answer")
        if answers:
            self._was_up, self._delay_s = True, FIRST_DELAY_S
        if self._group is not None and self._group.first_has_exited and self._group.settle():
            self._ended(self._group)
        elif self._group is None and self._command is not None and not answers and time.monotonic() >= self._due:
            self._start(self._command)

    def _start(self, command: Sequence[str]) -> None:
        self._tell("starting", f"log: {self._log}")
        try:
            self._group = Group(command, self._environment, self._log, f"start of the server: {' '.join(command)}")
        except EngineFailed as error:
            if not self._was_up:
                raise
            self._tell("ended", error.message)  # engines may serve without it: it is tried again
            self._wait()

    def _ended(self, group: Group) -> None:
        self._group = None
        ending = how(group.reap())
        if not self.up and not self._was_up:
            raise ServerUnavailable(
                f"the server {ending} as soon as it was started: {last_line(self._log)}",
                hint=f"Look at {self._log}.",
                details={"log": str(self._log)},
            )
        self._tell("ended", f"it {ending}; log: {self._log}")
        self._wait()

    def _wait(self) -> None:
        self._due = time.monotonic() + self._delay_s
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def end(self) -> None:
        """End it if it is ours."""
        if self._group is None:
            return
        self._group.end(STOP_S)
        self._tell("ended", "")
        self._group = None
