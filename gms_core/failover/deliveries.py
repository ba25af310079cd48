"""Hands things to a function one after the other, in a daemon thread, so that whoever hands them in never waits."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from gms_core.failover.status import RoleChange

log = logging.getLogger(__name__)


class Deliveries:
    """A queue of changes of role, and the thread that delivers them; it starts with the first one."""

    def __init__(self, name: str, deliver: Callable[[RoleChange], None]) -> None:
        """Prepare.

        Args:
            name: Of the thread.
            deliver: Called with each change, in order. What it raises is logged.
        """
        self._name = name
        self._deliver = deliver
        self._guard = threading.Lock()
        self._queue: queue.SimpleQueue[RoleChange | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, change: RoleChange) -> None:
        """Deliver a change, after those that were put in before. Nothing after `close`."""
        with self._guard:
            if self._closed:
                return
            self._queue.put(change)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Take nothing more, and wait for what was put in, for so many seconds at most. Idempotent."""
        with self._guard:
            first, self._closed = not self._closed, True
        if first:
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (change := self._queue.get()) is not None:
            try:
                self._deliver(change)
            except Exception:
                log.exception("a change of role could not be delivered")
