"""Who is a primary, seen from three sides at once: what the server says, who listens on the port, and who answers there as what."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

from failover_story import Running

from chaos.sockets import Listeners
from gms_core.client import Session
from gms_core.errors import GmsError
from gms_core.fleet.engines import engines

LOOK_S = 0.005
ASK_S = 0.1


class Answer(NamedTuple):
    """What was answered at the port when somebody asked who is there."""

    asked: float
    cohort: str
    term: int
    role: str


class Watch:
    """Looks every few milliseconds, from entering its context to leaving it.

    Args:
        server: Whose states are asked for.
        port: Of the loopback interface, where the primary listens.
        running: All engines that may listen there.

    Attributes:
        most_roles: Engines that the server called primary at one instant, at most.
        most_listeners: Engines whose sockets listened at one instant, at most.
        conflicts: Answers at the port that two primaries at once would explain.
        looks: How often it has looked.
    """

    def __init__(self, server: Any, port: int, running: Callable[[], Iterable[Running]]) -> None:
        self.most_roles = self.most_listeners = self.looks = 0
        self.conflicts: list[str] = []
        self.answers: dict[int, str] = {}
        self._server, self._port, self._running = server, port, running
        self._owners: dict[int, str] = {}
        self._latest: Answer | None = None
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._look, self._listen, self._ask)]

    @property
    def most(self) -> int:
        """Primaries at once, at most, from whichever side there seemed to be the most."""
        return max(self.most_roles, self.most_listeners, 2 if self.conflicts else 0)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _look(self) -> None:
        """Count whom the server calls primary."""
        session: Session | None = None
        while not self._stop.wait(LOOK_S):
            try:
                session = session or self._server.connect("watch")
                serving = [engine.name for engine in engines([session.status()]) if engine.standing == "primary"]
            except GmsError:
                if session is not None:
                    session.close()
                session = None
            else:
                self.looks += 1
                self.most_roles = max(self.most_roles, len(serving))
        if session is not None:
            session.close()

    def _listen(self) -> None:
        """Count whose sockets listen."""
        with Listeners(self._port) as listeners:
            while not self._stop.wait(LOOK_S):
                owners = {self._owner(inode) for inode in listeners.inodes()}
                self.most_listeners = max(self.most_listeners, len(owners))

    def _owner(self, inode: int) -> str:
        """Which engine has a socket, which several of its processes may share; the socket itself if that cannot be said any more."""
        if inode not in self._owners:
            self._owners[inode] = next((running.name for running in self._running() if _has(running, inode)), f"socket {inode}")
        return self._owners[inode]

    def _ask(self) -> None:
        """Ask at the port who is there: terms only ever grow, and each has one owner."""
        while not self._stop.wait(ASK_S):
            asked = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2.0)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                connection.request("GET", "/gms/status")
                told = json.loads(connection.getresponse().read())
                self._judge(Answer(asked, told["cohort"], told["term"], told["role"]))

    def _judge(self, answer: Answer) -> None:
        if answer.role != "primary":
            return
        if self.answers.setdefault(answer.term, answer.cohort) != answer.cohort:
            self.conflicts.append(f"term {answer.term} is {answer.cohort}'s and {self.answers[answer.term]}'s")
        if self._latest is not None and answer.term < self._latest.term:
            self.conflicts.append(f"term {answer.term} of {answer.cohort} after term {self._latest.term} of {self._latest.cohort}")
        self._latest = answer


def _has(running: Running, inode: int) -> bool:
    for pid in running.pids():
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()) == f"socket:[{inode}]":
                        return True
    return False
