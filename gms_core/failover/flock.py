"""A lock file: whoever has it locked is elected, and the file tells who that is.

The kernel releases the lock when the last copy of the descriptor is closed, so no copy may outlive the process: the descriptor is close-on-exec, and
a forked child closes its copy at once. A lock that is free again proves that the process will do nothing more, not that its device has finished what
it was given (see ADR 7).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from gms_core.errors import ConfigurationError, PermissionRefused, SessionClosed
from gms_core.failover.process import EngineProcess

log = logging.getLogger(__name__)

LONGEST_PAYLOAD = 4096
"""Bytes; what a file holds beyond them is not ours."""
_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


class Owner(msgspec.Struct, frozen=True):
    """What a lock file tells: its first line, as JSON.

    Attributes:
        engine: What people call the engine that locked the file last; it need not live any more.
        cohort: Its cohort.
        pid: Of its process that did.
        host: Name of its machine.
        term: +1 with each election.
        since: When, in seconds since 1970.
    """

    engine: str
    cohort: str
    pid: int
    host: str
    term: int
    since: float


def read_owner(path: Path) -> Owner | None:
    """Who locked a file last, or None if it says nothing that makes sense. That it is locked now is not known."""
    try:
        with path.open("rb") as file:
            return _parse(file.read(LONGEST_PAYLOAD))
    except OSError:
        return None


def _parse(data: bytes) -> Owner | None:
    try:
        owner = msgspec.json.decode(data.partition(b"\n")[0], type=Owner)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return owner if owner.term > 0 else None


class FileLock:
    """A lock file. It stays locked until its process has ended, or `close`.

    Attributes:
        path: Of the file; made if it is not there. Its directory has to be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._descriptor = -1
        self._busy = False
        self._closed = False
        _locks.add(self)

    def open(self) -> None:
        """Open the file, without locking it. Idempotent. Early, so that the kernel closes it late when the process dies: after its GPU memory.

        Raises:
            ConfigurationError: The directory is not there, or the path is no regular file.
            PermissionRefused: This user may not open it.
            SessionClosed: The lock was closed.
        """
        with self._guard:
            if self._closed:
                raise SessionClosed(f"the lock {self.path} was closed")
            if self._descriptor < 0:
                self._descriptor = _open(self.path)

    def acquire(self, process: EngineProcess, on_wait: Callable[[str], None] | None = None, *, at_least: int = 1) -> int:
        """Lock the file, however long that takes, and write the owner into it; returns the term.

        A file that was replaced or removed meanwhile counts as another lock: the one that the path names now is locked instead.

        Args:
            process: Who asks.
            on_wait: Called with the reason if the file is locked.
            at_least: The lowest term that is right.

        Raises:
            SessionClosed: The lock was closed meanwhile; it is not locked then.
            ConfigurationError: The file cannot be opened or written.
        """
        while True:
            self.open()
            descriptor = self._lend()
            try:
                _lock(descriptor, self.path, on_wait)
                current = _is_current(descriptor, self.path)
            except BaseException:
                self._take_back(keep=False)
                raise
            if not self._take_back(keep=current):
                raise SessionClosed(f"the lock {self.path} was closed while it was waited for")
            if current:
                return self._sign(descriptor, process, at_least)
            log.warning("the lock file %s was replaced or removed while it was waited for; the new one is locked instead", self.path)

    def resume(self, process: EngineProcess, socket: Path) -> None:
        """Nothing: a file knows nothing of servers."""

    def close(self) -> None:
        """Unlock and close the file. A thread that waits for it ends once it gets it, without keeping it. Idempotent."""
        with self._guard:
            self._closed = True
            if not self._busy:
                self._drop()

    def forget(self) -> None:
        """In a forked child: close its copy, so that the parent's end is the end of the lock."""
        self._guard = threading.Lock()  # a thread that the child does not have may hold the parent's
        self._closed = True
        self._drop()

    def _lend(self) -> int:
        """The descriptor, for a wait during which nobody may close it: its number could mean another file by the end of the wait."""
        with self._guard:
            if self._closed or self._busy:
                raise SessionClosed(f"the lock {self.path} was closed, or another thread waits for it")
            self._busy = True
            return self._descriptor

    def _take_back(self, *, keep: bool) -> bool:
        """End a wait; returns whether the lock was not closed meanwhile."""
        with self._guard:
            self._busy = False
            if self._closed or not keep:
                self._drop()
            return not self._closed

    def _drop(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _sign(self, descriptor: int, process: EngineProcess, at_least: int) -> int:
        before = os.pread(descriptor, LONGEST_PAYLOAD, 0)
        last = _parse(before)
        if last is None and before.strip():
            log.warning("the lock file %s held something that is no owner; it is overwritten", self.path)
        owner = Owner(
            engine=process.engine,
            cohort=process.cohort,
            pid=os.getpid(),
            host=socket.gethostname(),
            term=max(at_least, 1 if last is None else last.term + 1),
            since=time.time(),
        )
        line = msgspec.json.encode(owner) + b"\n"
        try:
            # The line ends in a newline and is cut to its length only then, so that a death in between leaves a first line that is whole.
            os.pwrite(descriptor, line, 0)
            os.ftruncate(descriptor, len(line))
        except OSError as error:
            self.close()
            raise ConfigurationError(f"the lock file {self.path} cannot be written: {error.strerror}") from error
        return owner.term


def check_directory(path: Path) -> None:
    """Check that the directory of a lock file exists, before anything is started that needs the lock.

    Raises:
        ConfigurationError: It does not.
        PermissionRefused: It is not this user's to look at.
    """
    with _opening(path):
        os.close(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def _open(path: Path) -> int:
    with _opening(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigurationError(f"the lock file {path} is no regular file")
    return descriptor


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise PermissionRefused(f"the lock file {path} may not be opened by this user: {error.strerror}") from error
    except OSError as error:
        raise ConfigurationError(f"the lock file {path} cannot be opened: {error.strerror}", hint="Its directory has to exist.") from error


def _lock(descriptor: int, path: Path, on_wait: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is not None:
            owner = read_owner(path)
            on_wait(f"{f'{owner.engine} (pid {owner.pid} on {owner.host})' if owner else 'another process'} has {path}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigurationError(f"the lock file {path} cannot be locked: {error.strerror}", hint="Its file system must support flock.") from error


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    return False


def _after_fork() -> None:
    for lock in list(_locks):
        lock.forget()


os.register_at_fork(after_in_child=_after_fork)
