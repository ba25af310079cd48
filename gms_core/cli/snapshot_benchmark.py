"""What saves and restores of a throw-away image take, beside plain writes and reads with the same kind of memory, in the same run."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gms_core.cli import fio
from gms_core.cli.plain_loop import timed
from gms_core.cli.snapshot_benchmark_objects import plain_read, plain_threads, plain_write, remove
from gms_core.client import Session, WriteLease, connect
from gms_core.errors import BackendUnavailable, GmsError, ProtocolError, TransferFailed
from gms_core.layout import Identity
from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.config import SnapshotConfig
from gms_core.snapshot.engine import dedicate_process
from gms_core.snapshot.folders import explained
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.orders import Figures
from gms_core.snapshot.registry import usable
from gms_core.snapshot.running import moves_objects, verifies
from gms_core.snapshot.shelves import open_shelf
from gms_core.snapshot.transfer import Job, Where
from gms_core.snapshot.whole import Outcome, Place, restore_snapshot, save_snapshot, verify_snapshot

SCHEMA = "gms-bench-snapshot/1"
POOL = "benchmark"
IDENTITY = Identity({"model": "gms snapshot benchmark"})
CHUNK_BYTES = 8 * 2**20
"""Read or written at once: what the default backend does."""
PATIENCE_S = 60.0

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What a backend has made of it.

    Attributes:
        backend: Its name.
        save: What the save has cost; None if the backend does not save.
        verify: What it has cost to read and to hash everything, into no memory.
        restore: What the restore has cost, the making of the memory included.
        error: Why it was left out; empty if it was not.
    """

    backend: str
    save: Figures | None = None
    verify: Figures | None = None
    restore: Figures | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the benchmark.

    Attributes:
        device: Whose memory it was.
        bytes: Of the image.
        roots: Where its files were.
        workers: Threads of the plain loops.
        plain_write_s: Seconds to write as much, past the page cache, and to sync it.
        plain_read_s: Seconds to read the files of the first snapshot, past the page cache.
        fio_write_s: Seconds that fio needs to write as much, and to sync it; 0 if it is not installed, or could not.
        fio_read_s: Seconds that fio needs to read the same files, past the page cache; 0 likewise.
        runs: Of each backend.
    """

    device: str
    bytes: int
    roots: tuple[str, ...]
    workers: int
    plain_write_s: float
    plain_read_s: float
    fio_write_s: float
    fio_read_s: float
    runs: tuple[Run, ...]


class Part(NamedTuple):
    """What a plain loop moves at once.

    Attributes:
        path: The file.
        position: Where in it.
        size: Bytes.
    """

    path: Path
    position: int
    size: int


def measure(socket: Path, roots: Sequence[Where], size: int, backends: Sequence[str], workers: int, tell: Tell) -> Result:
    """Measure. What is written is gone afterwards.

    Args:
        socket: Of a server that nobody else uses.
        roots: Where to write.
        size: Bytes of the image, a multiple of the device's granularity.
        backends: By name.
        workers: Threads; 0 for as many as suit each backend, and as many plain ones as the default has.
        tell: Called with what is being done.

    Raises:
        GmsError: The server or a disk has failed.
    """
    dedicate_process()
    config = SnapshotConfig(roots=tuple(roots), save_workers=workers, load_workers=workers)
    threads = workers or (plain_threads() if config.objects else max(2 * len(roots), min(16, max(4, len(os.sched_getaffinity(0))))))
    name = f"benchmark-{secrets.token_hex(4)}"
    plain = _Objects(str(roots[0])) if config.objects else _Directories([Path(root) for root in roots])
    with connect(socket_path=socket, client="gms snapshot benchmark") as session, contextlib.ExitStack() as stack:
        stack.callback(plain.remove, name)
        _publish(session, size)
        place = Place(session.device, socket, POOL)
        tell("plain writes")
        written = plain.write(name, size, threads)
        fio_written = plain.fio_write(tell, name, size)
        read = fio_read = 0.0
        runs: list[Run] = []
        for backend in backends:
            tell(backend)
            try:
                found = usable(backend)
                found.check(Job("restore", (), (), (), BLOCK_BYTES, workers, objects=moves_objects(found)))
                saves = "save" in found.directions
                saved = _figures(save_snapshot(lambda: [place], name, _with(config, backend if saves else ""), _ignore))
                if not read:
                    plain.forget(name)
                    read = plain.read(name, threads)
                    fio_read = plain.fio_read(tell, name)
                plain.forget(name)
                verified = _figures(verify_snapshot(name, _with(config, backend), _ignore)) if verifies(found) else None
                plain.forget(name)
                restored = _figures(
                    restore_snapshot(name, _with(config, backend), lambda _: [place], _ignore, timeout_s=PATIENCE_S, memory_timeout_s=PATIENCE_S)
                )
                runs.append(Run(backend, saved if saves else None, verified, restored))
            except BackendUnavailable as error:
                runs.append(Run(backend, error=error.message))
            else:
                open_shelf(roots).prune(name, keep=0)
        device = session.device
    return Result(device, size, tuple(map(str, roots)), threads, written, read, fio_written, fio_read, tuple(runs))


def _with(config: SnapshotConfig, backend: str) -> SnapshotConfig:
    return config.model_copy(update={"backend": backend})


def _figures(outcome: Outcome) -> Figures:
    """What the only image has cost."""
    ((_, done),) = outcome.images
    assert done is not None
    return done.figures


def _ignore(*_: object) -> None:
    """Progress is not shown: a line that is drawn takes time too."""


def _publish(session: Session, size: int) -> None:
    """Publish bytes that no disk can make less of."""
    lease = session.acquire(POOL, "rw", IDENTITY, timeout_s=PATIENCE_S)
    if not isinstance(lease, WriteLease):
        raise ProtocolError("the server gave a read lease to a writer")
    with lease:
        offset = lease.arena.allocate(size)
        noise = os.urandom(2 * CHUNK_BYTES)
        for position in range(0, size, len(noise)):
            session.driver.write(lease.arena.address(offset + position), noise[: size - position])
        session.driver.synchronize()
        lease.commit(b"", IDENTITY).release()


class _Directories:
    """Plain writes and reads of files over some directories.

    Args:
        roots: The directories.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots

    def write(self, name: str, size: int, threads: int) -> float:
        """Seconds to write as many bytes as an image has, and to sync them."""
        return _plain_write(self._roots, name, size, threads)

    def read(self, name: str, threads: int) -> float:
        """Seconds to read the files of a snapshot's first image."""
        return _timed(_parts(self._files(name)), threads, os.preadv, os.O_RDONLY)

    def fio_write(self, tell: Tell, name: str, size: int) -> float:
        """Seconds that fio needs to write as many bytes; 0 without it."""
        return _fio(tell, partial(_fio_write, self._roots, name, size))

    def fio_read(self, tell: Tell, name: str) -> float:
        """Seconds that fio needs to read the same files; 0 without it."""
        return _fio(tell, partial(fio.read_s, self._files(name)))

    def forget(self, name: str) -> None:
        """Have the kernel drop them from the page cache."""
        _forget(self._files(name))

    def remove(self, name: str) -> None:
        """Leave nothing."""
        with contextlib.suppress(GmsError):
            open_shelf(self._roots).prune(name, keep=0)
        for root in self._roots:
            shutil.rmtree(root / name, ignore_errors=True)

    def _files(self, name: str) -> list[tuple[Path, int]]:
        with open_shelf(self._roots).find(name) as snapshot:
            return [(Path(file.path), file.size) for file in snapshot.files(0)]


class _Objects:
    """The same with an object store, of which nothing is in a page cache here.

    Args:
        url: Of the root.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def write(self, name: str, size: int, threads: int) -> float:
        """See `_Directories.write`."""
        return plain_write(self._url, name, size, threads)

    def read(self, name: str, threads: int) -> float:
        """See `_Directories.read`."""
        with open_shelf([self._url]).find(name) as snapshot:
            return plain_read([(str(file.path), file.size) for file in snapshot.files(0)], threads)

    def fio_write(self, tell: Tell, name: str, size: int) -> float:  # noqa: ARG002 - fio knows files alone
        """See `_Directories.fio_write`."""
        return 0.0

    def fio_read(self, tell: Tell, name: str) -> float:  # noqa: ARG002 - fio knows files alone
        """See `_Directories.fio_read`."""
        return 0.0

    def forget(self, name: str) -> None:
        """See `_Directories.forget`. There is nothing to do."""

    def remove(self, name: str) -> None:
        """See `_Directories.remove`."""
        remove(self._url, name)


def _parts(files: Sequence[tuple[Path, int]]) -> list[Part]:
    """The parts of files, in turn, so that all disks are used all the time."""
    each = [[Part(path, place, min(CHUNK_BYTES, size - place)) for place in range(0, size, CHUNK_BYTES)] for path, size in files]
    longest = max(map(len, each), default=0)
    return [parts[index] for index in range(longest) for parts in each if index < len(parts)]


def _plain_write(roots: Sequence[Path], name: str, size: int, threads: int) -> float:
    """Seconds to write as many bytes over the roots as an image has, and to sync them."""
    share = _share(roots, size)
    files = []
    with contextlib.ExitStack() as stack:
        for root in roots:
            path = root / f".{name}"
            with explained("written", path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                stack.callback(os.unlink, path)
                stack.callback(os.close, descriptor)
                os.posix_fallocate(descriptor, 0, share)
            files.append((path, share, descriptor))
        spent = _timed(_parts([(path, length) for path, length, _ in files]), threads, os.pwritev, os.O_WRONLY)
        began = time.perf_counter()
        for path, _, descriptor in files:
            with explained("synced", path):
                os.fdatasync(descriptor)
        return (spent + time.perf_counter() - began) * size / (share * len(roots))


def _share(roots: Sequence[Path], size: int) -> int:
    """Bytes for each root, if they are all to have as much of an image."""
    return -(-size // len(roots) // CHUNK_BYTES) * CHUNK_BYTES


def _fio_write(roots: Sequence[Path], name: str, size: int) -> float:
    share = _share(roots, size)
    files = [(root / f".{name}", share) for root in roots]
    try:
        return fio.write_s(files) * size / (share * len(roots))
    finally:
        for path, _ in files:
            path.unlink(missing_ok=True)


def _fio(tell: Tell, measure: Callable[[], float]) -> float:
    """What fio has needed; 0 without it. It stands beside what is measured, so its failure is none of that."""
    if not fio.installed():
        return 0.0
    tell("fio")
    try:
        return measure()
    except TransferFailed as error:
        tell(error.message)
        return 0.0


def _timed(parts: Sequence[Part], threads: int, move: Callable[[int, Sequence[memoryview], int], int], flags: int) -> float:
    """Seconds to move parts between files and buffers in huge pages, past the page cache where that can be done."""

    @contextlib.contextmanager
    def mover() -> Iterator[Callable[[Part, Buffer], None]]:
        with _descriptors(flags) as descriptor_of:

            def move_part(part: Part, buffer: Buffer) -> None:
                done = 0
                with explained("moved", part.path):
                    while done < part.size:
                        count = move(descriptor_of(part.path), [buffer.view[done : part.size]], part.position + done)
                        if count == 0:
                            return
                        done += count

            yield move_part

    return timed(parts, threads, CHUNK_BYTES, mover)


@contextlib.contextmanager
def _descriptors(flags: int) -> Iterator[Callable[[Path], int]]:
    """Opens each file once."""
    known: dict[Path, int] = {}

    def descriptor_of(path: Path) -> int:
        if path not in known:
            try:
                known[path] = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
            except OSError:  # a file system without it
                known[path] = os.open(path, flags | os.O_CLOEXEC)
        return known[path]

    try:
        yield descriptor_of
    finally:
        for descriptor in known.values():
            os.close(descriptor)


def _forget(files: Sequence[tuple[Path, int]]) -> None:
    """Have the kernel drop files from the page cache."""
    for path, _ in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
