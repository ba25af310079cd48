"""A live server under hostile frames: processes that connect, send, and break off, again and again, and what it costs the server.

    python -m tests.fuzz --seed 7 --frames 1000000

The senders are processes of their own: one of them may join a cohort, and break the connection off, and then the server rightly kills it.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gms_core.client import connect
from gms_core.errors import GmsError
from gms_core.protocol.framing import encode
from gms_core.protocol.messages import Hello
from tests.conftest import RunningServer
from tests.fuzz.hostile import frame

ANSWER_S = 20.0
"""Seconds in which a server under fire has to tell its status."""
SETTLE_S = 60.0
"""Seconds for what the senders have begun to end: waits, exits, half sent frames."""
CLIENT = "fuzz"
GROWTH_BYTES = 32 * 2**20
"""Growth of the resident memory, from one point after the warm-up to the end, that is put down to the allocator."""


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        frames: That were sent.
        crashes: Servers that ended.
        hangs: Times at which the server did not answer in time.
        fenced: Senders that were killed by the server, as it has to.
        rss_growth: Bytes, from the end of the warm-up to the end.
        descriptor_growth: Open descriptors, in the same time.
        findings: What must not be; empty if all is well.
    """

    seed: int
    frames: int = 0
    connections: int = 0
    seconds: float = 0.0
    crashes: int = 0
    hangs: int = 0
    fenced: int = 0
    rss_growth: int = 0
    descriptor_growth: int = 0
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def send(path: Path, seed: int, frames: int, tell: int) -> None:
    """Be a sender: so many frames on as many connections as that takes. Each number on ``tell`` is frames sent since the last one."""
    chance = random.Random(seed)
    numbers = array.array("i", [tell] * 253)
    left = frames
    while left > 0:
        sent = 0
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            try:
                connection.connect(os.fspath(path))
                if chance.random() < 0.95:
                    connection.sendall(encode(Hello((2, 1), client=CLIENT)))
                for _ in range(min(left, chance.choice((1, 5, 20, 100)))):
                    one = frame(chance)
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers[: one.descriptors])] if one.descriptors else []
                    sent += 1
                    if one.data:
                        taken = connection.sendmsg([one.data], rights)
                        connection.sendall(one.data[taken:])
                    if chance.random() < 0.3:
                        connection.setblocking(False)
                        _read(connection)
                        connection.settimeout(ANSWER_S)
                if chance.random() < 0.5:
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(0.05)
                    _read(connection)
            except OSError:  # the server has cut the connection off, or its queue is full
                pass
        left -= max(sent, 1)
        os.write(tell, b"%d\n" % sent)


def _read(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(253 * 4))
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    for number in array.array("i", content[: len(content) - len(content) % 4]):
                        os.close(number)
            if not data:
                return


class Senders:
    """Processes that send, and are replaced when the server has killed them."""

    def __init__(self, path: Path, outcome: Outcome, number: int) -> None:
        self._path, self._outcome = path, outcome
        self._chance = random.Random(outcome.seed)
        self._count = number
        self._running: list[tuple[subprocess.Popen[bytes], int]] = []

    def run(self, frames: int) -> None:
        """Have so many frames sent, and wait for the end."""
        target, looked = self._outcome.frames + frames, time.monotonic()
        while self._outcome.frames < target or self._running:
            while self._outcome.frames < target and len(self._running) < self._count:
                self._start(max(1, min(5000, (target - self._outcome.frames) // self._count)))
            for process, pipe in list(self._running):
                self._collect(pipe)
                if (code := process.poll()) is not None:
                    self._collect(pipe)
                    os.close(pipe)
                    self._running.remove((process, pipe))
                    if code == -signal.SIGKILL:
                        self._outcome.fenced += 1
                    elif code:
                        self._outcome.findings.append(f"a sender ended with code {code}")
            if time.monotonic() - looked > 2.0:
                looked = time.monotonic()
                answers(self._path, self._outcome)
            time.sleep(0.01)

    def _start(self, frames: int) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        code = "import sys; from pathlib import Path; from tests.fuzz.live import send; send(Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        words = [str(self._path), str(self._chance.randrange(2**32)), str(frames), str(writing)]
        self._running.append((subprocess.Popen([sys.executable, "-c", code, *words], pass_fds=[writing]), reading))
        os.close(writing)

    def _collect(self, pipe: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(pipe, 65536):
                counts = [int(word) for word in data.split()]  # a short write of a pipe is whole
                self._outcome.frames += sum(counts)
                self._outcome.connections += len(counts)

    def end(self) -> None:
        for process, pipe in self._running:
            process.kill()
            process.wait()
            os.close(pipe)


def answers(path: Path, outcome: Outcome) -> int:
    """See that the server tells its status; returns its process, or 0."""
    try:
        with connect(socket_path=path, client="fuzz observer", timeout_s=ANSWER_S) as session:
            return session.status().pid
    except GmsError as error:
        outcome.hangs += 1
        outcome.findings.append(f"the server does not answer: {error}")
        return 0


def measure(server: RunningServer, pid: int, descriptors: int = sys.maxsize) -> tuple[int, Counter[str]]:
    """Resident bytes of the server, and open descriptors by kind: once what was begun has ended, and, if that comes, no more than so many."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        with server.connect("fuzz observer") as session:
            report = session.status()
            found = _descriptors(pid)
            found["of allocations"] = -2 * report.allocations  # each has two: its handle, and what clients get
        quiet = not any(session.client == CLIENT for session in report.sessions) and not report.cohorts
        if (quiet and found.total() <= descriptors) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"), found


def _descriptors(pid: int) -> Counter[str]:
    """Open descriptors of a process by what they are, without the numbers of that."""
    kinds: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            kinds[re.sub(r"[0-9]+", "N", os.readlink(path))] += 1
    return kinds


def run(server: RunningServer, seed: int, frames: int, senders: int = 3) -> Outcome:
    """Send so many frames, a tenth of them to warm up, and compare what the server needs before and after the rest."""
    outcome, began = Outcome(seed), time.monotonic()
    pid = server.pid
    hands = Senders(server.socket, outcome, senders)
    try:
        hands.run(max(1, frames // 10))
        before = measure(server, pid)
        hands.run(frames - outcome.frames)
        after = measure(server, pid, before[1].total())
    finally:
        hands.end()
    outcome.seconds = round(time.monotonic() - began, 1)
    if answers(server.socket, outcome) != pid:
        outcome.crashes += 1
        outcome.findings.append("another server answers than at the start")
    outcome.rss_growth, outcome.descriptor_growth = after[0] - before[0], after[1].total() - before[1].total()
    if outcome.rss_growth > GROWTH_BYTES:
        outcome.findings.append(f"the server's memory has grown by {outcome.rss_growth} bytes")
    if outcome.descriptor_growth > 0:
        outcome.findings.append(f"the server has {outcome.descriptor_growth} descriptors more: {dict(before[1])} before, {dict(after[1])} after")
    return outcome
