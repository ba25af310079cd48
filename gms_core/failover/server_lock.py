"""A lock that a device server arbitrates, with a lock file behind it.

The server grants it in order of arrival, and only once the process that was elected before has exited. A server that was restarted has
forgotten whom it elected, while that engine may still serve. So whoever is elected also locks a file beside the server's socket: the kernel knows
what the new server cannot.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from gms_core.client import Membership
from gms_core.errors import AcquireTimeout, SessionClosed
from gms_core.failover.flock import FileLock
from gms_core.failover.process import EngineProcess

log = logging.getLogger(__name__)

PATIENCE_S = 24 * 3600.0
"""Seconds for one request to be elected, the most that a server allows; then the engine asks again, and is the last in the queue."""


def lock_file(socket: Path, name: str) -> Path:
    """The file behind a lock of a server: beside its socket, so that the devices of a host have different ones."""
    return socket.with_name(f"{socket.stem}.lock-{name}")


class ServerLock:
    """A lock of the server of an engine's first device. It is kept until the engine has ended, or `close`.

    Attributes:
        name: The lock's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._guard = threading.Lock()
        self._memberships: list[Membership] = []
        self._file: FileLock | None = None
        self._closed = False

    def open(self) -> None:
        """Nothing: which server arbitrates is known once the engine has its devices."""

    def acquire(self, process: EngineProcess, on_wait: Callable[[str], None] | None = None) -> int:
        """Be elected, however long that takes; returns the term, which never goes down, not even when the server is restarted.

        Args:
            process: Who asks.
            on_wait: Called with the reason, each time that it changes.

        Raises:
            ConnectionLost: The server has gone.
            CohortFenced: The server is ending this engine.
            SessionClosed: The lock was closed meanwhile.
        """
        socket = process.sockets[0]
        membership = self._keep(process.join(socket, part="election"))
        term = self._elect(membership, on_wait)
        file = FileLock(lock_file(socket, self.name))
        with self._guard:
            if self._closed:
                raise SessionClosed(f"the lock {self.name} was closed")
            self._file = file
        return file.acquire(process, on_wait, at_least=term)

    def resume(self, process: EngineProcess, socket: Path) -> None:
        """Take the lock of a server that was restarted, if it is this lock's server and nobody has it there. It never waits.

        Args:
            process: The primary's.
            socket: Of the server that can be reached again.
        """
        if socket != process.sockets[0]:
            return
        membership = self._keep(process.join(socket, part="election"))
        try:
            membership.elect(self.name, 0.0)
        except AcquireTimeout as error:
            log.warning("the restarted server at %s counts another engine as elected, which waits for the lock file: %s", socket, error.message)

    def close(self) -> None:
        """End the sessions and unlock the file. An engine departs first: its cohort is ended otherwise. Idempotent."""
        with self._guard:
            self._closed = True
            memberships, self._memberships = self._memberships, []
            file, self._file = self._file, None
        for membership in memberships:
            membership.close()
        if file is not None:
            file.close()

    def _keep(self, membership: Membership) -> Membership:
        with self._guard:
            if not self._closed:
                self._memberships.append(membership)
                return membership
        membership.close()
        raise SessionClosed(f"the lock {self.name} was closed")

    def _elect(self, membership: Membership, on_wait: Callable[[str], None] | None) -> int:
        while True:
            try:
                return membership.elect(self.name, PATIENCE_S, on_wait)
            except AcquireTimeout:
                log.info("still not elected by %s; asking again", self.name)
