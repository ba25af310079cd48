"""The snapshot that `gms run` restores before engines start, and again when a server has come back, which may have lost everything."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gms_core.errors import EngineFailed
from gms_core.exit_words import how
from gms_core.fleet.groups import Group, last_line

DELAY_S = 5.0
"""Seconds from a try that has failed to the next."""
STOP_S = 10.0
"""Seconds that a restore gets to end by itself."""

REASON = "gms: "
"""How the line begins in which a command says why it has failed. A hint follows it."""


class Restoring:
    """A command that restores what is missing, as a fleet needs it.

    Args:
        command: What restores; None if there is nothing to restore.
        environment: For the command.
        log: Where its output goes.
        tell: Called with its state and a reason, each time that it changes.

    Attributes:
        done: Whether engines may start.
    """

    def __init__(self, command: Sequence[str] | None, environment: Mapping[str, str], log: Path, tell: Callable[[str, str], None]) -> None:
        self.done = command is None
        self._command, self._environment, self._log, self._tell = command, environment, log, tell
        self._group: Group | None = None
        self._begin = 0
        self._was_done = False
        self._due = 0.0

    @property
    def pidfd(self) -> int:
        """Readable once the command has ended; -1 if it does not run."""
        return -1 if self._group is None or self._group.first_has_exited else self._group.pidfd

    @property
    def ending(self) -> bool:
        """Whether its processes are on their way out, of which only the first one can be waited for."""
        return self._group is not None and self._group.first_has_exited

    def observe(self, *, server_up: bool) -> None:
        """Note whether the servers answer, and go on with what is to be done.

        Raises:
            EngineFailed: It has failed, or cannot be started, and has never ended well: another try would end in the same way.
        """
        if self._command is None:
            return
        if self._group is not None:
            if self._group.first_has_exited and self._group.settle():
                self._ended(self._group)
        elif not server_up:
            self.done = False  # what comes back may have nothing
        elif not self.done and time.monotonic() >= self._due:
            self._tell("starting", f"log: {self._log}")
            with contextlib.suppress(FileNotFoundError):
                self._begin = self._log.stat().st_size
            try:
                self._group = Group(self._command, self._environment, self._log, f"restore: {' '.join(self._command)}")
            except EngineFailed as error:
                self._failed(error)

    def _ended(self, group: Group) -> None:
        self._group = None
        code = group.reap()
        if code == 0:
            self.done = self._was_done = True
            self._tell("done", last_line(self._log))
            return
        reason = last_line(self._log, REASON, self._begin).removeprefix(REASON) or last_line(self._log)
        self._failed(EngineFailed(f"the snapshot is not restored: its command {how(code)}: {reason}", hint=f"Look at {self._log}."))

    def _failed(self, error: EngineFailed) -> None:
        if not self._was_done:
            raise error
        self._due = time.monotonic() + DELAY_S
        self._tell("failed", error.message)  # engines that run need nothing of it

    def end(self) -> None:
        """End it if it runs."""
        if self._group is None:
            return
        self._group.end(STOP_S)
        self._group = None
