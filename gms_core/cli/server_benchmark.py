"""What ``gms bench server`` measures: a server with a thousand readers, ten thousand sessions that come and go, and a pool of thousands of pieces."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_core.cli.attach_benchmark import Range, published
from gms_core.cli.attach_worker import IDENTITY
from gms_core.client import ReadLease, Session, connect
from gms_core.errors import InvalidArgument, ProtocolError
from gms_core.protocol.messages import Export

SCHEMA = "gms-bench-server/1"
POOL_BYTES = 64 * 2**10
ROUND_TRIPS = 2000
BATCHES = 10
CLIENT = "gms bench server"
ECHO_BYTES = 200
"""About what a request and its answer have."""
SPARE_FILES = 256

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """Round trips with so many readers at a time, which take turns; seconds.

    Attributes:
        readers: Sessions, each with a read lease.
        acquire: A read lease and its layout.
        release: Giving it back.
    """

    readers: int
    acquire: Range
    release: Range


@dataclass(frozen=True, slots=True)
class Process:
    """What the server's process takes.

    Attributes:
        resident_bytes: Of memory.
        descriptors: Open files.
    """

    resident_bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the benchmark; times are in seconds.

    Attributes:
        echo: A round trip of a Unix socket between two threads of which each only echoes: what the kernel and Python take by themselves.
        loads: With more and more readers.
        sessions: That were opened and closed.
        session: Seconds for each of them, by tenths of the run.
        pieces: Allocations of the pool that was attached to.
        export: Seconds to get all their descriptors, and the layout, without mapping any.
        server_before: Before anything.
        server_full: With all readers.
        server_after: When all have gone.
    """

    device: str
    driver: str
    server: str
    echo: Range
    loads: tuple[Load, ...]
    sessions: int
    session: tuple[float, ...]
    pieces: int
    export: Range
    server_before: Process
    server_full: Process
    server_after: Process


def measure(path: Path, readers: int, sessions: int, pieces: int, tell: Tell) -> Result:
    """Measure a server that nobody else uses.

    Args:
        path: Its socket.
        readers: Read leases at a time, at most.
        sessions: To open and close.
        pieces: Allocations of the smallest size in one pool.
        tell: Called with what is being done.

    Raises:
        InvalidArgument: This process may not have that many files open.
        GmsError: The server failed.
    """
    _allow_files(max(readers, pieces) + SPARE_FILES)
    with connect(socket_path=path, client=CLIENT) as session:
        granularity = session.welcome.granularity
        pid = session.status().pid
        tell("a bare round trip")
        echo = _echo()
        size = max(POOL_BYTES, granularity)
        with published(session, size, size):
            pass  # what the server opens for the first memory stays open
        before = _process(pid)
        with published(session, size, size) as (pool, _):
            loads, full = _loads(path, pool, readers, pid, tell)
        each = _come_and_go(path, sessions, tell)
        tell(f"a pool of {pieces} allocations")
        with published(session, pieces * granularity, granularity) as (pool, _):
            export = _range([_export(path, pool) for _ in range(5)])
        gc.collect()
        report = session.status()
        after = _process(pid)
    return Result(
        device=report.device,
        driver=report.driver,
        server=report.server,
        echo=echo,
        loads=tuple(loads),
        sessions=sessions,
        session=tuple(each),
        pieces=pieces,
        export=export,
        server_before=before,
        server_full=full,
        server_after=after,
    )


def _allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InvalidArgument(f"this process may have {hard} files open, and needs {wanted}", hint="Raise ulimit -Hn, or choose smaller numbers.")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _echo() -> Range:
    """Round trips of a Unix socket, with nothing done in between."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def answer() -> None:
        while data := theirs.recv(4096):
            theirs.sendall(data)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with theirs, ours:
        times = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            ours.sendall(b"x" * ECHO_BYTES)
            ours.recv(4096)
            times.append(time.perf_counter() - began)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
    return _range(times)


def _loads(path: Path, pool: str, readers: int, pid: int, tell: Tell) -> tuple[list[Load], Process]:
    loads: list[Load] = []
    with contextlib.ExitStack() as open_sessions:
        held: list[tuple[Session, ReadLease]] = []
        for count in _steps(readers):
            tell(f"{count} readers")
            while len(held) < count:
                session = open_sessions.enter_context(connect(socket_path=path, client=CLIENT))
                held.append((session, _lease(session, pool)))
            loads.append(_take_turns(held, pool))
        full = _process(pid)
        for _, lease in held:
            lease.release()
    return loads, full


def _steps(most: int) -> list[int]:
    """1, 10, 100 and so on, and the last one."""
    return [*itertools.takewhile(lambda count: count < most, (10**power for power in itertools.count())), most]


def _take_turns(held: list[tuple[Session, ReadLease]], pool: str) -> Load:
    acquired, released = [], []
    for number in itertools.islice(itertools.cycle(range(len(held))), max(ROUND_TRIPS, len(held))):
        session, lease = held[number]
        began = time.perf_counter()
        lease.release()
        middle = time.perf_counter()
        held[number] = session, _lease(session, pool)
        acquired.append(time.perf_counter() - middle)
        released.append(middle - began)
    return Load(len(held), _range(acquired), _range(released))


def _lease(session: Session, pool: str) -> ReadLease:
    lease = session.acquire(pool, "ro", IDENTITY, timeout_s=10.0)
    if not isinstance(lease, ReadLease):
        raise ProtocolError("the server gave a write lease to a reader")
    return lease


def _come_and_go(path: Path, sessions: int, tell: Tell) -> Iterator[float]:
    """Open and close sessions one after the other; seconds for each, by tenths of them."""
    for batch in range(BATCHES):
        count = sessions * (batch + 1) // BATCHES - sessions * batch // BATCHES
        tell(f"sessions that come and go, {sessions * batch // BATCHES} of {sessions}")
        began = time.perf_counter()
        for _ in range(count):
            connect(socket_path=path, client=CLIENT).close()
        if count:
            yield (time.perf_counter() - began) / count


def _export(path: Path, pool: str) -> float:
    """Seconds from a connection to all descriptors of a pool, which are closed."""
    with connect(socket_path=path, client=CLIENT) as session:
        began = time.perf_counter()
        lease = _lease(session, pool)
        session.receive_allocations(Export(pool), lambda _: None)
        took = time.perf_counter() - began
        lease.release()
    return took


def _range(times: Sequence[float]) -> Range:
    return Range(min(times), statistics.median(times), max(times))


def _process(pid: int) -> Process:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    return Process(1024 * resident, len(os.listdir(f"/proc/{pid}/fd")))
