"""What the further API servers of an engine do: they open their gates when the first one has made the engine the primary."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from gms_core.client import Membership
from gms_core.errors import AcquireTimeout, CohortFenced, GmsError, RoleConflict
from gms_core.failover.links import LONGEST_PAUSE_S, LOST, Link, beat, depart_all, join_all
from gms_core.failover.locks import last_owner
from gms_core.failover.process import EngineProcess
from gms_core.failover.progress import Progress
from gms_core.failover.server_lock import PATIENCE_S
from gms_core.failover.status import EngineState, Promoted
from gms_core.failover.threads import in_thread
from gms_core.protocol.messages import Role

log = logging.getLogger(__name__)

EXCUSED: tuple[Role, ...] = ("init", "standby", "promoting", "fenced")
"""All but primary: a follower is not told when the ranks wait for their memory and answer nothing, and harms nobody until it serves."""


class Follower:
    """An API server of an engine whose first API server has the `Control`. It obeys the role that that one reports."""

    def __init__(self, process: EngineProcess, state: EngineState, *, check: Callable[[], object] | None = None) -> None:
        """Prepare; `start` connects.

        Args:
            process: This one.
            state: This process's own; it has to be standby when `follow` begins.
            check: As in `Control`.

        Raises:
            InvalidArgument: The process has a deadline, and there is no ``check``.
        """
        self._process = process
        self._state = state
        self._progress = Progress(state, check, process.deadline_s, excused=EXCUSED)
        self._guard = threading.Lock()
        self._links: list[Link] = []
        self._awaiting: Membership | None = None
        self._ended = False
        self._stop = threading.Event()
        self._again = threading.Event()

    def start(self, *, on_demote: Callable[[], None], on_lost: Callable[[GmsError], None]) -> None:
        """Join every server. The callbacks run in threads, and at most one of them is called, once.

        Args:
            on_demote: The first API server has said that the engine, which was the primary, ends in an orderly way: this process drains and ends.
            on_lost: The engine was fenced by the loss of a server, or by a server, for this reason: this process has to end.

        Raises:
            GmsError: A server is not there, or does not want this process. None has a connection then.
        """
        self._on_demote, self._on_lost = on_demote, on_lost
        links = [
            Link(
                self._process,
                socket,
                exchange=beat,  # the connection's end is noticed so
                progress=self._progress.count,
                on_lost=lambda _, error: self._lost(error),
                on_found=self._found,
                on_fenced=self._fenced,
            )
            for socket in dict.fromkeys(self._process.sockets)
        ]
        join_all(links)
        self._links = links
        self._progress.start()
        for link in links:
            link.start()

    async def follow(self) -> None:
        """Wait until the engine is the primary: this process's state is primary when this returns, and its gate may open.

        Raises:
            GmsError: The engine was ended before. This process has to end.
        """
        if not await in_thread(lambda: self._await("primary"), name="gms-follow"):
            raise self._state.over()
        owner = last_owner(self._state.lock, self._process.sockets[0])
        try:
            self._state.elected(owner.term if owner is not None and owner.cohort == self._process.cohort else 0)
            self._state.promoted(Promoted())
        except RoleConflict as error:
            raise self._state.over() from error
        threading.Thread(target=self._await_end, name="gms-follow-end", daemon=True).start()

    def depart(self, grace_s: float) -> None:
        """Tell every server that the whole engine ends within so many seconds: whichever API server ends first says it. Blocks for a moment."""
        depart_all(self._links, grace_s)

    def close(self) -> None:
        """End threads and connections. An engine departs first: its cohort is ended otherwise. Idempotent."""
        self._stop.set()
        self._again.set()
        self._progress.close()
        for link in self._links:
            link.close()
        self._forget()

    def _await_end(self) -> None:
        if self._await("fenced"):
            self._state.end("the engine was demoted, or is stopped")
            if self._first():
                self._on_demote()

    def _await(self, role: Role) -> bool:
        """Wait until the engine has a role; returns whether it has it, and was not ended, or this follower closed, before."""
        while not self._stop.is_set() and self._state.role != "fenced":
            try:
                self._membership().await_role(role, PATIENCE_S)
            except AcquireTimeout:
                continue
            except CohortFenced as error:
                self._fenced(error)
            except LOST as error:
                self._forget()
                self._again.clear()
                if not self._stop.is_set() and self._lost(error):
                    self._again.wait(LONGEST_PAUSE_S)
            else:
                return True
        return False

    def _membership(self) -> Membership:
        """The membership for these waits; a new one if the last one broke."""
        with self._guard:
            membership = self._awaiting
        if membership is None:
            membership = self._process.join(self._process.sockets[0], part="role")
            with self._guard:
                self._awaiting = membership
            if self._stop.is_set():
                self._forget()
        return membership

    def _forget(self) -> None:
        with self._guard:
            awaiting, self._awaiting = self._awaiting, None
        if awaiting is not None:
            awaiting.close()

    def _found(self, socket: Path) -> None:
        self._state.note("")
        if socket == self._process.sockets[0]:
            self._again.set()

    def _lost(self, error: GmsError) -> bool:
        ending = self._state.role == "fenced"
        if self._state.server_lost(error):
            log.error("a server is lost: %s. The primary goes on without it", error)
            return True
        if not ending:
            self._end(error)
        return False

    def _fenced(self, error: CohortFenced) -> None:
        self._state.end(error.message, error)
        self._end(error)

    def _end(self, error: GmsError) -> None:
        if self._first():
            log.error("%s ends: %s", self._process.engine, error)
            self._on_lost(error)

    def _first(self) -> bool:
        with self._guard:
            first, self._ended = not self._ended, True
        return first
