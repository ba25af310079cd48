"""The places of an agent in its engine's cohort, one on each server of this node that a rank has named. It beats there, and tells the role."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from gms_core.client import Membership
from gms_core.engine_log import log
from gms_core.errors import GmsError
from gms_core.failover.cohort import this_process
from gms_core.protocol.messages import Role


class Memberships:
    """They last as long as the process."""

    def __init__(self, name: str, deadline_s: float, beats: int) -> None:
        """Join none yet.

        Args:
            name: Of the process in its cohort.
            deadline_s: Seconds without a beat after which a server ends the cohort.
            beats: How many there are in that time.
        """
        self._name, self._deadline_s, self._pause_s = name, deadline_s, deadline_s / beats
        self._guard = threading.Lock()
        self._joined: dict[Path, Membership] = {}
        self._grace_s: float | None = None
        self._standing: tuple[Role, str] | None = None
        self._told: dict[Path, tuple[Role, str]] = {}
        self._changed = threading.Event()
        threading.Thread(target=self._beat, name="gms-agent-beat", daemon=True).start()

    def join(self, socket: str, connect_timeout_s: float) -> None:
        """Join the cohort on a server. Idempotent; a place that was lost is taken anew.

        Args:
            socket: Of the server.
            connect_timeout_s: Seconds to connect.

        Raises:
            GmsError: It is not there, or does not want this process.
        """
        path = Path(socket)
        with self._guard:
            if path in self._joined:
                return
            membership = this_process(self._name, (path,), serves=False, connect_timeout_s=connect_timeout_s).join(path, deadline_s=self._deadline_s)
            self._joined[path] = membership
            self._changed.set()
            if self._grace_s is not None:
                membership.depart(self._grace_s)

    def depart(self, grace_s: float) -> None:
        """Tell all servers that the engine ends in order, within so many seconds. One that is not there need not know."""
        with self._guard:
            self._grace_s = grace_s
            for membership in self._joined.values():
                try:
                    membership.depart(grace_s)
                except GmsError as error:
                    log().debug("a server was not told of the end: %s", error)

    def stand(self, role: Role, detail: str) -> None:
        """The engine has this role from now on; all servers are told so, soon."""
        self._standing = (role, detail)
        self._changed.set()

    def _beat(self) -> None:
        while True:
            self._changed.wait(self._pause_s)
            self._changed.clear()
            with self._guard:
                for path, membership in list(self._joined.items()):
                    try:
                        self._say(path, membership)
                    except GmsError as error:  # the server was restarted, and lost: ranks join it anew, and name it again
                        log().info("the server at %s is lost to the agent: %s", path, error)
                        del self._joined[path]
                        self._told.pop(path, None)
                        with contextlib.suppress(GmsError):
                            membership.close()

    def _say(self, path: Path, membership: Membership) -> None:
        membership.beat()
        standing = self._standing
        if standing is not None and self._told.get(path) != standing:
            membership.report(*standing)
            self._told[path] = standing
