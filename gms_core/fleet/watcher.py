"""Asks the servers of a runtime directory for their state again and again, in threads: a server that hangs keeps nobody else waiting."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from gms_core.client import Session, connect
from gms_core.errors import GmsError
from gms_core.protocol.messages import StatusReport
from gms_core.runtime_dir import sockets

CONNECT_S = 2.0
STALE_S = 3.0
"""Seconds after which a server that has not answered again counts as lost."""


class Watcher:
    """The last reports of all servers.

    Args:
        directory: The runtime directory. Sockets that appear later are found by `reports`.
        client: How the sessions show in status.
        interval_s: Seconds between two questions to a server.

    Attributes:
        news: Descriptor that is readable when a report has come, or a server was lost; `reports` clears it.
    """

    def __init__(self, directory: Path, client: str, interval_s: float) -> None:
        self.news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._directory = directory
        self._client = client
        self._interval_s = interval_s
        self._askers: dict[Path, _Asker] = {}

    def reports(self) -> list[StatusReport]:
        """What each server that answers has said last."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.news)
        for path in sockets(self._directory):
            if path not in self._askers:
                self._askers[path] = _Asker(path, self._client, self._interval_s, self.news)
        return [report for asker in self._askers.values() if (report := asker.report()) is not None]

    def close(self) -> None:
        """Ask no more."""
        for asker in self._askers.values():
            asker.stop()
        for asker in self._askers.values():
            asker.join()
        os.close(self.news)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Asker(threading.Thread):
    """Asks one server, for as long as it is wanted: a server that is started again has the same socket."""

    def __init__(self, path: Path, client: str, interval_s: float, news: int) -> None:
        super().__init__(name=f"asks {path.stem}", daemon=True)
        self._path, self._client, self._interval_s, self._news = path, client, interval_s, news
        self._stopping = threading.Event()
        self._session: Session | None = None
        self._last: tuple[float, StatusReport] | None = None
        self.start()

    def report(self) -> StatusReport | None:
        """What the server has said last; None if it does not answer."""
        last = self._last
        return last[1] if last is not None and time.monotonic() - last[0] < STALE_S else None

    def stop(self) -> None:
        """Ask no more, and break off a question that waits for its answer."""
        self._stopping.set()
        session = self._session
        if session is not None:
            session.close()

    def run(self) -> None:
        while not self._stopping.is_set():
            self._ask()
            os.eventfd_write(self._news, 1)
            self._stopping.wait(self._interval_s)
        if self._session is not None:
            self._session.close()

    def _ask(self) -> None:
        try:
            if self._session is None:
                self._session = connect(socket_path=self._path, client=self._client, timeout_s=CONNECT_S)
                if self._stopping.is_set():  # `stop` may have seen no session to close
                    return
            self._last = (time.monotonic(), self._session.status())
        except GmsError:
            if self._session is not None:
                self._session.close()
            self._session = self._last = None
