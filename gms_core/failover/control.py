"""What the first API server of an engine does beside its service: it reports to the servers, obeys orders, and shows that the engine lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from gms_core.client import Membership
from gms_core.errors import CohortFenced, GmsError
from gms_core.failover.links import Link, depart_all, join_all, report
from gms_core.failover.locks import FailoverLock
from gms_core.failover.process import EngineProcess
from gms_core.failover.progress import Progress
from gms_core.failover.status import EngineState, RoleChange
from gms_core.protocol.messages import Order, Role

log = logging.getLogger(__name__)

EXCUSED: tuple[Role, ...] = ("init", "promoting")
"""Ranks answer nothing while they compile or warm up, and while they wait for memory. The promotion has a time limit of its own."""


class Control:
    """The standing connections of an engine's first API server with the servers of all its devices.

    When a server is lost, a primary goes on, and its connection is made anew once the server is back; any other engine is fenced.
    """

    def __init__(
        self,
        process: EngineProcess,
        state: EngineState,
        lock: FailoverLock,
        *,
        check: Callable[[], object] | None = None,
        on_found: Callable[[Path], None] | None = None,
    ) -> None:
        """Prepare; `start` connects.

        Args:
            process: This one.
            state: The engine's.
            lock: What elects it.
            check: Returns once every process of the engine has answered; blocks for as long as one does not. Needed if the process has a deadline.
            on_found: Called in a thread when a lost server is back, and this process has joined it again: the engine's others should, too.

        Raises:
            InvalidArgument: The process has a deadline, and there is no ``check``.
        """
        self._process = process
        self._state = state
        self._lock = lock
        self._on_found = on_found
        self._progress = Progress(state, check, process.deadline_s, excused=EXCUSED)
        self._guard = threading.Lock()
        self._orders: dict[Path, Order] = {}
        self._told: set[str] = set()
        self._to_be_demoted = False
        self._links: list[Link] = []

    def start(self, *, on_promote: Callable[[], None], on_demote: Callable[[], None], on_lost: Callable[[GmsError], None]) -> None:
        """Join every server, and begin to report, about every half second and at each change of role. The callbacks run in threads.

        Args:
            on_promote: An operator wants the engine promoted, such as `Promotion.go`.
            on_demote: An operator wants the engine demoted, while it is the primary: it drains, departs and ends. Called once.
            on_lost: The engine was fenced by the loss of a server, or by a server, for this reason: its process has to end. Called at most once; not
                if the engine was fenced before, and `Promotion.run` raises the same error if it was the first to notice.

        Raises:
            GmsError: A server is not there, or does not want this process. None has a connection then.
        """
        self._on_promote, self._on_demote, self._on_lost = on_promote, on_demote, on_lost
        links = [
            Link(
                self._process,
                socket,
                exchange=lambda membership, socket=socket: self._exchange(socket, membership),  # type: ignore[misc]
                progress=self._progress.count,
                on_lost=self._lost,
                on_found=self._found,
                on_fenced=self._fenced,
            )
            for socket in dict.fromkeys(self._process.sockets)
        ]
        join_all(links)
        self._links = links
        self._state.listen(self._changed)
        self._progress.start()
        for link in links:
            link.start()

    def depart(self, grace_s: float) -> None:
        """Report the role, then tell every server that the whole engine ends within so many seconds. Blocks for a moment. Idempotent."""
        depart_all(self._links, grace_s)

    def close(self) -> None:
        """End threads and connections. An engine departs first: its cohort is ended otherwise. Idempotent."""
        self._progress.close()
        for link in self._links:
            link.close()

    def _exchange(self, socket: Path, membership: Membership) -> None:
        order = report(membership, *self._state.reported())
        with self._guard:
            new = order != self._orders.get(socket, "")
            self._orders[socket] = order
        if new and order == "promote" and self._first("promote"):
            log.info("an operator wants %s promoted", self._process.engine)
            self._on_promote()
        elif order == "demote":
            self._demote(new=new)

    def _demote(self, *, new: bool) -> None:
        """Carry the order out. One that comes during the promotion waits for its end; a shadow keeps none for later."""
        role = self._state.role
        if new:
            log.info("an operator wants %s demoted, which is %s", self._process.engine, role)
            self._to_be_demoted = role in ("promoting", "primary")
        if self._to_be_demoted and role == "primary" and self._first("demote"):
            self._on_demote()

    def _changed(self, _: RoleChange) -> None:
        for link in self._links:
            link.wake()

    def _lost(self, socket: Path, error: GmsError) -> bool:
        ending = self._state.role == "fenced"
        if self._state.server_lost(error):
            log.error("the server at %s is lost: %s. The primary goes on without it", socket, error)
            return True
        if not ending:
            self._end(error)
        return False

    def _found(self, socket: Path) -> None:
        with self._guard:
            self._orders.pop(socket, None)
        self._state.note("")
        self._lock.resume(self._process, socket)
        if self._on_found is not None:
            self._on_found(socket)

    def _fenced(self, error: CohortFenced) -> None:
        self._state.end(error.message, error)
        self._end(error)

    def _end(self, error: GmsError) -> None:
        if self._first("lost"):
            log.error("%s ends: %s", self._process.engine, error)
            self._on_lost(error)

    def _first(self, what: str) -> bool:
        """Whether this is the first time that it is told."""
        with self._guard:
            first = what not in self._told
            self._told.add(what)
            return first
