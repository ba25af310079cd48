"""A simulated engine: a first process, which is elected, and its ranks, all of one cohort over all servers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import selectors
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from gms_core.config import export_cohort
from gms_core.failover.cohort import take_place, this_process
from gms_core.failover.locks import open_lock
from tools.groups.rank import Rank

FORK = multiprocessing.get_context("fork")
"""So that hundreds of processes import the core once."""
LOCK = "gms:primary"
PATIENCE_S = 120.0


class Engine:
    """An engine from outside. Its first process answers over a pipe. Engines of one tag share weights, and stand in for one another."""

    def __init__(self, name: str, tag: str, ranks: int, sockets: Sequence[Path]) -> None:
        here, there = FORK.Pipe()
        self._pipe = here
        self._process = FORK.Process(target=_lead, args=(name, tag, ranks, sockets, there), daemon=False)
        self._process.start()
        there.close()
        self.pids: list[int] = self.ask("pids")

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have the first process do something, and wait for it."""
        self.tell(name, *arguments)
        return self.answer()

    def tell(self, name: str, *arguments: Any) -> None:
        """Have it do something; `answer` waits for it."""
        self._pipe.send((name, arguments))

    def answer(self) -> Any:
        """What it says to what it was told."""
        if not self._pipe.poll(PATIENCE_S):
            raise TimeoutError("an engine does not answer")
        kind, said = self._pipe.recv()
        if kind != "done":
            raise RuntimeError(said)
        return said

    def kill_rank(self, number: int) -> float:
        """Kill a rank; returns when."""
        killed = time.monotonic()
        os.kill(self.pids[number + 1], signal.SIGKILL)
        return killed

    def until_gone(self) -> float:
        """Wait until no process of it is there; returns when."""
        self._process.join(PATIENCE_S)
        while any(map(_lives, self.pids)):
            time.sleep(0.001)
        return time.monotonic()

    def end(self) -> None:
        """End it, in whatever state it is."""
        self._pipe.close()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.until_gone()


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _lead(name: str, tag: str, ranks: int, sockets: Sequence[Path], pipe: Connection) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ranks that have ended
    export_cohort(secrets.token_hex(16), name)
    pipes: list[Connection] = []
    pids = [os.getpid()]
    for number in range(ranks):
        here, there = FORK.Pipe()
        pid = os.fork()
        if pid == 0:
            for other in (*pipes, here, pipe):
                other.close()
            Rank(number, ranks, tag, sockets[number % len(sockets)], there).obey()
            os._exit(0)
        there.close()
        pipes.append(here)
        pids.append(pid)
    leader = _Leader(name, sockets, pipes, pids)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", getattr(leader, method)(*arguments)))
        except Exception as error:  # noqa: BLE001 - it is told to whoever has asked
            pipe.send(("failed", str(error)))


class _Leader:
    """The first process."""

    def __init__(self, name: str, sockets: Sequence[Path], pipes: Sequence[Connection], pids: Sequence[int]) -> None:
        self._name, self._sockets, self._pipes, self._pids = name, tuple(sockets), pipes, pids
        self._selector = selectors.DefaultSelector()
        for number, pipe in enumerate(pipes):
            self._selector.register(pipe, selectors.EVENT_READ, number)
        self._lock = open_lock(LOCK)  # kept for as long as the engine lives: its connection is what the servers see of the primary

    def pids(self) -> list[int]:
        """Of all processes, this one first."""
        return list(self._pids)

    def connect(self) -> None:
        """Join the cohort, on every server."""
        self._all("connect")
        take_place("api-server 0", self._sockets, serves=True, connect_timeout_s=30.0)

    def lease(self) -> tuple[list[str], float]:
        """Which leases the ranks got, and in how many seconds."""
        return self._timed("lease")

    def publish(self) -> tuple[list[None], float]:
        """Seconds that it took."""
        return self._timed("publish")

    def attach(self) -> tuple[list[None], float]:
        """Seconds that it took."""
        return self._timed("attach")

    def stand_by(self) -> tuple[list[None], float]:
        """Seconds that it took."""
        return self._timed("stand_by")

    def serve(self) -> tuple[int, float, float, list[int]]:
        """Be elected, and have all ranks promoted: the term, when it was elected, when all had their memory, and the epochs."""
        term = self._lock.acquire(this_process("api-server 0", self._sockets))
        elected = time.monotonic()
        epochs = self._all("promote")
        return term, elected, time.monotonic(), epochs

    def _timed(self, name: str, *arguments: Any) -> tuple[list[Any], float]:
        start = time.monotonic()
        return self._all(name, *arguments), time.monotonic() - start

    def _all(self, name: str, *arguments: Any) -> list[Any]:
        """Have all ranks do something at once, and pass on what they say to each other."""
        self._send((name, arguments))
        done: dict[int, Any] = {}
        said: dict[int, Any] = {}
        while len(done) < len(self._pipes):
            for key, _ in self._selector.select():
                kind, what = self._pipes[key.data].recv()
                if kind == "failed":
                    raise RuntimeError(what)
                (said if kind == "says" else done)[key.data] = what
            if len(said) == len(self._pipes):
                everything, said = [said[number] for number in range(len(self._pipes))], {}
                self._send(everything)
        return [done[number] for number in range(len(self._pipes))]

    def _send(self, what: Any) -> None:
        """The same to all ranks, pickled once."""
        pickled = ForkingPickler.dumps(what)
        for pipe in self._pipes:
            pipe.send_bytes(pickled)
