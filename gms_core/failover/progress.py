"""Proof that an engine makes progress: a thread that asks all of its processes, again and again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection

from gms_core.errors import InvalidArgument
from gms_core.failover.status import EngineState
from gms_core.protocol.messages import Role

log = logging.getLogger(__name__)

CHECKS_IN_A_DEADLINE = 3


class Progress:
    """Counts the answers of an engine's processes. While one of them hangs, the count stands still."""

    def __init__(self, state: EngineState, check: Callable[[], object] | None, deadline_s: float, *, excused: Collection[Role]) -> None:
        """Prepare; `start` begins.

        Args:
            state: The engine's.
            check: Returns once every process has answered.
            deadline_s: Seconds in which there have to be answers; 0 for no such watch.
            excused: Roles in which the count goes on by itself.

        Raises:
            InvalidArgument: There is a deadline and no check.
        """
        if deadline_s and check is None:
            raise InvalidArgument(f"a deadline of {deadline_s:g} s needs a check of the engine's progress")
        self._state = state
        self._check = check
        self._excused = frozenset(excused)
        self._period_s = deadline_s / CHECKS_IN_A_DEADLINE
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gms-progress", daemon=True)

    def count(self) -> int:
        """Grows while the engine makes progress."""
        if self._state.role in self._excused:
            self._count += 1
        return self._count

    def start(self) -> None:
        """Begin to ask, if there is a deadline."""
        if self._period_s:
            self._thread.start()

    def close(self) -> None:
        """Ask no more. A check that hangs is left behind in its daemon thread."""
        self._stop.set()

    def _run(self) -> None:
        told = ""
        while self._check is not None and not self._stop.is_set():
            try:
                self._check()
            except Exception as error:  # noqa: BLE001 - an engine's own error: what follows from it is for the deadline to say
                if str(error) != told:
                    told = str(error)
                    log.warning("the check of %s's progress failed: %s: %s", self._state.engine, type(error).__name__, error)
            else:
                self._count += 1
            self._stop.wait(self._period_s)
