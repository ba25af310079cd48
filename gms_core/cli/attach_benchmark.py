"""What ``gms bench attach`` measures: publish a pool, then attach to it from fresh processes, with the bare driver as the peer."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gms_core.cli.attach_worker import IDENTITY, PHASES, STAMP
from gms_core.client import Session, WriteLease, connect
from gms_core.client.session import SLAB_BYTES
from gms_core.devices import HOST, DeviceId, list_gpus
from gms_core.errors import AllocationTooLarge, DriverUnavailable, GmsError, InvalidArgument, ProtocolError, ServerUnavailable, rebuild
from gms_core.protocol.messages import StatusReport
from gms_core.runtime_dir import socket_path, sockets

SCHEMA = "gms-bench-attach/1"
DEFAULT_BYTES = {"cuda": 100 * 2**30, "host": 2**30}
SHARE_OF_FREE = 0.8
"""Of the free memory, at most, when the user names no size."""
WORKER_S = 120
KINDS = ("attach", "bare")

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Range:
    """Seconds over the repetitions."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the benchmark.

    Attributes:
        bytes: Of the published pool.
        allocations: Slabs that it consists of.
        times: By kind (``attach``, ``bare``), then by phase and ``total``.
    """

    device: str
    driver: str
    server: str
    bytes: int
    slab: int
    allocations: int
    repeat: int
    times: dict[str, dict[str, Range]]


def default_device(runtime_dir: Path | None) -> DeviceId:
    """The only server of the directory; without a directory the first GPU, or ``host`` where there is none.

    Raises:
        InvalidArgument: The directory has several servers.
        ServerUnavailable: It has none.
    """
    if runtime_dir is not None:
        found = sockets(runtime_dir)
        if not found:
            raise ServerUnavailable(f"no server has a socket in {runtime_dir}", hint="Leave --runtime-dir out to start a private one.")
        if len(found) > 1:
            names = ", ".join(path.stem for path in found)
            raise InvalidArgument(f"{runtime_dir} has several servers", hint=f"Choose one with --device: {names}.")
        return DeviceId(found[0].stem)
    try:
        gpus = list_gpus()
    except DriverUnavailable:
        gpus = []
    return gpus[0].id if gpus else HOST


def measure(socket: Path, size: int | None, slab: int | None, repeat: int, tell: Tell) -> Result:
    """Publish a pool into the server at ``socket``, attach ``repeat`` times each way, and remove the pool.

    Args:
        socket: Of a running server.
        size: Bytes; None for the default of the driver, or less where less is free.
        slab: Bytes of a slab; None for the client's default.
        repeat: Fresh processes of each kind.
        tell: Called with what is being done.

    Raises:
        GmsError: The server, or one of the processes, failed.
    """
    with connect(socket_path=socket, client="gms bench") as session:
        report = session.status()
        slab = _whole(slab or SLAB_BYTES[report.driver], session.welcome.granularity)
        size = _whole(size, session.welcome.granularity) if size is not None else _default_size(report, slab)
        if size > report.memory_total:
            total = f"{report.memory_total} bytes in all"
            raise AllocationTooLarge(f"a pool of {size} bytes cannot fit: {report.device} has {total}", hint="Choose a smaller one with --bytes.")
        tell(f"publishing {size / 2**30:.4g} GiB")
        with published(session, size, slab) as (pool, allocations):
            samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for number in range(repeat):
                for kind in KINDS:
                    tell(f"{kind} {number + 1} of {repeat}")
                    samples[kind].append(_run_worker(kind, socket, pool))
    times = {kind: _ranges(samples[kind]) for kind in KINDS}
    return Result(report.device, report.driver, report.server, size, slab, allocations, repeat, times)


def _whole(size: int, granularity: int) -> int:
    if size % granularity:
        raise InvalidArgument(f"{size} bytes are not a multiple of the device's granularity of {granularity} bytes")
    return size


def _default_size(report: StatusReport, slab: int) -> int:
    fits = int(report.memory_free * SHARE_OF_FREE) // slab * slab
    return min(DEFAULT_BYTES[report.driver], max(fits, slab))


@contextmanager
def published(session: Session, size: int, slab: int) -> Iterator[tuple[str, int]]:
    """A pool of this size, for as long as the context lasts."""
    pool = f"bench-{os.getpid()}"
    lease = _write_lease(session, pool, slab, None)
    with lease:
        lease.arena.reserve_exact(size)
        offset = lease.arena.allocate(size)
        for place in (offset, offset + size - len(STAMP)):
            session.driver.write(lease.arena.address(place), STAMP)
        published = lease.commit(b"", IDENTITY)
    try:
        yield pool, len(published.layout.allocations)
    finally:
        generation = published.layout.generation
        published.release()
        _write_lease(session, pool, slab, generation).release()  # a draft in place of the generation, and then nothing: the memory is free again


def _write_lease(session: Session, pool: str, slab: int, replace: int | None) -> WriteLease:
    lease = session.acquire(pool, "rw", IDENTITY, timeout_s=30.0, slab_bytes=slab, replace=replace)
    if not isinstance(lease, WriteLease):
        raise ProtocolError("the server gave a read lease to a writer")
    return lease


def _run_worker(kind: str, socket: Path, pool: str) -> dict[str, float]:
    command = [sys.executable, "-P", "-m", "gms_core.cli.attach_worker", kind, os.fspath(socket), pool]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WORKER_S, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise GmsError(f"an attaching process did not end within {WORKER_S} s") from error
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise GmsError(f"an attaching process exited with code {done.returncode}: {last[0]}") from error
    if "error" in answer:
        failure = answer["error"]
        raise rebuild(failure["code"], failure["message"], failure["hint"], failure["details"])
    seconds: dict[str, float] = answer["seconds"]
    return seconds


def _ranges(samples: list[dict[str, float]]) -> dict[str, Range]:
    phases = [phase for phase in (*PHASES, "total") if phase in samples[0]]
    columns = {phase: [sample[phase] for sample in samples] for phase in phases}
    return {phase: Range(min(column), statistics.median(column), max(column)) for phase, column in columns.items()}


@contextmanager
def private_server(device: DeviceId) -> Iterator[Path]:
    """The socket of a server of its own, in a temporary runtime directory, for as long as the context lasts.

    Raises:
        ServerUnavailable: It did not start; what it said is part of the message.
    """
    with tempfile.TemporaryDirectory(prefix="gms-bench-") as directory, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-P", "-m", "gms_core.cli", "serve", "--device", device, "--runtime-dir", directory]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        with process:
            try:
                if not (process.stdout and process.stdout.readline()):
                    process.wait()
                    log.seek(0)
                    raise ServerUnavailable(f"the private server did not start: {log.read().strip() or f'exit code {process.returncode}'}")
                yield socket_path(device, Path(directory))
            finally:
                process.send_signal(signal.SIGTERM)
