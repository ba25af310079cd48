"""One process's standing connection with one device server: a thread that keeps it up, and finds it again for a primary."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from gms_core.client import Membership
from gms_core.errors import CohortFenced, ConnectionLost, GmsError, ProtocolError, ServerUnavailable, SessionClosed
from gms_core.failover.process import EngineProcess
from gms_core.protocol.messages import Beat, Done, Order, Orders, Report, Role

log = logging.getLogger(__name__)

EXCHANGE_S = 0.5
"""Seconds between two exchanges."""
LONGEST_PAUSE_S = 5.0
"""Seconds between two attempts to find a lost server again, at most."""
HUNG_SERVER_S = 7 * 24 * 3600.0
"""Seconds to wait for an answer of a server that is there. To end the connection would make the server, once it goes on, end the engine."""
LEAVE_S = 30.0
"""Seconds that an engine which could not join all of its servers has to end."""
DEPART_S = 3.0
"""Seconds that telling the servers of a departure may take."""
LOST = (ConnectionLost, SessionClosed, ServerUnavailable, ProtocolError)


def report(membership: Membership, role: Role, detail: str) -> Order:
    """Say what the engine is now; returns what an operator wants of it. Waits for a server that hangs."""
    return membership.session.ask(Report(role, detail), Orders, HUNG_SERVER_S).wanted


def beat(membership: Membership) -> None:
    """Say that this process lives. Waits for a server that hangs."""
    membership.session.ask(Beat(), Done, HUNG_SERVER_S)


def join_all(links: Sequence[Link]) -> None:
    """Connect all of them, or none.

    Raises:
        GmsError: One could not be connected.
    """
    try:
        for link in links:
            link.join()
    except BaseException:
        for link in links:
            link.leave()
        raise


def depart_all(links: Sequence[Link], grace_s: float) -> None:
    """Tell every server that the whole engine ends within so many seconds. Blocks for a moment."""
    for link in links:
        link.depart(grace_s)
    for link in links:
        if not link.await_departed(DEPART_S):
            log.warning("the server at %s was not told within %g s that this engine ends", link.socket, DEPART_S)


class Link:
    """A process's sessions with one server.

    Attributes:
        socket: Of the server.
    """

    def __init__(
        self,
        process: EngineProcess,
        socket: Path,
        *,
        exchange: Callable[[Membership], None],
        progress: Callable[[], int],
        on_lost: Callable[[Path, GmsError], bool],
        on_found: Callable[[Path], None],
        on_fenced: Callable[[CohortFenced], None],
    ) -> None:
        """Prepare a link; `join` connects it.

        Args:
            process: Who it is for.
            socket: Of the server.
            exchange: Called about every `EXCHANGE_S` with the membership; says and asks whatever is to be said and asked.
            progress: A count; while it grows, the session that has the deadline beats.
            on_lost: The server has gone; returns whether it is to be found again.
            on_found: It was found again, and joined; what this raises is logged.
            on_fenced: The server is ending the engine, or has ended it.
        """
        self.socket = socket
        self._process = process
        self._exchange = exchange
        self._progress = progress
        self._on_lost = on_lost
        self._on_found = on_found
        self._on_fenced = on_fenced
        self._period_s = min(EXCHANGE_S, process.deadline_s / 4) if process.deadline_s else EXCHANGE_S
        self._wake = threading.Event()
        self._departed = threading.Event()
        self._grace_s: float | None = None
        self._closed = False
        self._main: Membership | None = None
        self._watch: Membership | None = None
        self._seen = -1
        self._thread = threading.Thread(target=self._run, name=f"gms-link-{socket.stem[:24]}", daemon=True)

    def join(self) -> None:
        """Connect to the server, and join the engine's cohort there. What was joined stays so if it raises: try again, or `leave`.

        Raises:
            GmsError: It is not there, or does not want this process.
        """
        if self._main is None:
            self._main = self._process.join(self.socket)
        if self._watch is None and self._process.deadline_s:
            self._watch = self._process.join(self.socket, part="watch", deadline_s=self._process.deadline_s)

    def leave(self) -> None:
        """Undo `join`: to end the sessions alone would be taken for this process's death."""
        with contextlib.suppress(GmsError):  # a server that cannot be told so ends the engine, which ends anyway
            if self._main is not None:
                self._main.depart(LEAVE_S)
        self._drop()

    def start(self) -> None:
        """Begin the exchanges, in a daemon thread."""
        self._thread.start()

    def wake(self) -> None:
        """Make the next exchange now."""
        self._wake.set()

    def depart(self, grace_s: float) -> None:
        """Tell the server, after one last exchange, that the engine ends in an orderly way; returns at once, see `await_departed`."""
        self._grace_s = grace_s
        self._wake.set()

    def await_departed(self, timeout_s: float) -> bool:
        """Whether the server has been told so within some seconds, or is not there."""
        return self._departed.wait(timeout_s)

    def close(self) -> None:
        """End the thread and the sessions. A process departs first: its cohort is ended otherwise. Idempotent."""
        self._closed = True
        self._wake.set()
        self._drop()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(LONGEST_PAUSE_S)

    def _drop(self) -> None:
        memberships, self._main, self._watch = (self._main, self._watch), None, None
        for membership in memberships:
            if membership is not None:
                membership.close()

    def _run(self) -> None:
        try:
            while not self._closed and not self._departed.is_set() and self._keep_up():
                self._wake.wait(self._period_s)
                self._wake.clear()
        except Exception:
            log.exception("the thread for the server at %s has ended by an error of its own", self.socket)
            raise
        finally:
            self._departed.set()
            if self._closed:
                self._drop()  # what was joined while it was being closed

    def _keep_up(self) -> bool:
        """One exchange; returns whether there is to be another."""
        try:
            self._once()
        except CohortFenced as error:
            self._on_fenced(error)
            return False
        except LOST as error:
            return not self._closed and self._on_lost(self.socket, error) and self._find()
        except GmsError as error:
            log.warning("the server at %s refused a report: %s", self.socket, error)
        return True

    def _once(self) -> None:
        main, watch, grace_s = self._main, self._watch, self._grace_s
        if main is None:
            return
        self._exchange(main)
        count = self._progress()
        if watch is not None and count != self._seen:
            self._seen = count
            beat(watch)
        if grace_s is not None:
            main.depart(grace_s)
            self._departed.set()

    def _welcome(self) -> None:
        log.info("the server at %s is back", self.socket)
        try:
            self._on_found(self.socket)
        except GmsError as error:  # if it has gone again, the next exchange finds that out
            log.warning("the server at %s is back, but was not told all: %s", self.socket, error)

    def _find(self) -> bool:
        """Join again, however long it takes; returns whether it was found."""
        self._drop()
        pause_s, told = EXCHANGE_S, ""
        while not self._closed and self._grace_s is None:
            try:
                self.join()
            except CohortFenced as error:
                self._on_fenced(error)
                return False
            except GmsError as error:
                if error.message != told:
                    told = error.message
                    log.warning("the server at %s is not back yet: %s", self.socket, error)
            else:
                self._welcome()
                return True
            self._wake.wait(pause_s)
            self._wake.clear()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return False
