"""Reads the events of the servers of a runtime directory, in a thread for each: what there is, and what comes. A server that ends is waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gms_core import __version__
from gms_core.client import Session, connect
from gms_core.errors import GmsError, VersionMismatch
from gms_core.events import Kind
from gms_core.protocol.messages import Event, EventBatch, Events, Status, StatusReport
from gms_core.runtime_dir import sockets

CONNECT_S = 2.0
POLL_S = 600.0
"""Seconds that one request waits for an event. It costs the server nothing."""
AGAIN_S = 0.2
"""Seconds between two tries to reach a server that has gone."""
OLD_S = 10.0
"""Seconds between two looks at whether a server of an older version has been replaced."""
LOOK_S = 1.0
"""Seconds between two looks for servers that are new."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a log has been read: the log's name, and the number of the last event; empty for nothing yet."""

    log: str = ""
    last: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """An event, and of which device's server, in which log."""

    device: str
    log: str
    event: Event


def read_past(path: Path, client: str) -> tuple[list[Told], Cursor]:
    """All events that a server has kept, the oldest first.

    Args:
        path: Of its socket.
        client: How the session shows in status.

    Raises:
        VersionMismatch: It is of a version that has no events.
        GmsError: It does not answer.
    """
    found: list[Told] = []
    with connect(socket_path=path, client=client, timeout_s=CONNECT_S) as session:
        _check(session)
        cursor, more = Cursor(), True
        while more:
            told, cursor = _read(session, cursor, 0.0)
            found += told
            more = bool(told)
    return found, cursor


def _check(session: Session) -> None:
    if session.ask(Status(brief=True), StatusReport).observation is None:
        raise VersionMismatch(
            f"the server of {session.device} (gms {session.welcome.server}) has no events, this is gms {__version__}",
            hint="Have it replaced, which loses nothing: gms serve --replace",
        )


def _read(session: Session, cursor: Cursor, wait_s: float) -> tuple[list[Told], Cursor]:
    batch = session.ask(Events(cursor.log, cursor.last, wait_s), EventBatch, wait_s)
    device = str(session.device)
    found = [Told(device, batch.log, event) for event in batch.events]
    if batch.lost and batch.log == cursor.log and batch.events:  # to begin late is no loss
        first = batch.events[0]
        lost = Event(0, first.time_s, first.monotonic_s, Kind.EVENTS_LOST.value, device, {"count": batch.lost})
        found.insert(0, Told(device, batch.log, lost))
    return found, Cursor(batch.log, batch.last)


class EventReader:
    """Gives events as they come.

    Args:
        directory: The runtime directory. Servers that appear later are found.
        devices: Only these; none for all.
        client: How the sessions show in status.
        cursors: How far each server's log has been read already, by socket. Others are read from their beginning.
    """

    def __init__(self, directory: Path, devices: Sequence[str], client: str, cursors: Mapping[Path, Cursor]) -> None:
        self._directory, self._devices, self._client, self._cursors = directory, devices, client, cursors
        self._told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._threads: dict[Path, _Thread] = {}
        self._look()

    def next(self, timeout_s: float) -> Told | None:
        """The next event; None if there is none within so many seconds."""
        try:
            return self._told.get(timeout=timeout_s)
        except queue.Empty:
            self._look()
            return None

    def drain(self) -> None:
        """Forget what has come so far."""
        while not self._told.empty():
            self._told.get()

    def __iter__(self) -> Iterator[Told]:
        """Events, for ever."""
        while True:
            if (told := self.next(LOOK_S)) is not None:
                yield told

    def _look(self) -> None:
        for path in sockets(self._directory, self._devices):
            if path not in self._threads:
                self._threads[path] = _Thread(path, self._client, self._cursors.get(path, Cursor()), self._told)

    def close(self) -> None:
        """Read no more."""
        for thread in self._threads.values():
            thread.stop()
        for thread in self._threads.values():
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Thread(threading.Thread):
    """Reads the events of one socket's server, and of those that follow it."""

    def __init__(self, path: Path, client: str, cursor: Cursor, told: queue.SimpleQueue[Told]) -> None:
        super().__init__(name=f"events {path.stem}", daemon=True)
        self._path, self._client, self._cursor, self._told = path, client, cursor, told
        self._stopping = threading.Event()
        self._session: Session | None = None
        self.start()

    def stop(self) -> None:
        """Read no more, and break off a request that waits for its answer."""
        self._stopping.set()
        session = self._session
        if session is not None:
            session.close()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._follow()
            except VersionMismatch:
                self._stopping.wait(OLD_S)
            except GmsError:
                self._stopping.wait(AGAIN_S)

    def _follow(self) -> None:
        with connect(socket_path=self._path, client=self._client, timeout_s=CONNECT_S) as session:
            self._session = session
            _check(session)
            while not self._stopping.is_set():  # `stop` may have seen no session to close
                told, self._cursor = _read(session, self._cursor, POLL_S)
                for one in told:
                    self._told.put(one)
