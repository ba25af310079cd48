"""Who may change what: one saver or pruner of a name at a time, and nobody removes what is being read.

Both are locks of the kernel (flock(2)). Such a lock belongs to the open file, so it ends with the last process that has a descriptor of it, however
that ends: processes that write for a saver get its descriptors, for they may be there a little longer than it. The lock of a name is taken in every
root that is given: two savers meet also when they have only one root in common.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from gms_core.errors import SnapshotBusy, SnapshotError, SnapshotNotFound
from gms_core.snapshot.folders import Folder, explained
from gms_core.snapshot.on_disk import LOCK, check_name
from gms_core.snapshot.roots import Root

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""Seconds for which a lock is asked for again: whoever only looks whether it is taken has it for an instant."""
_AGAIN_S = 0.02
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL})
_LONGEST_NUMBER = 32


def _try(descriptor: int, operation: int) -> bool:
    """Lock an open file, or find that another process has it."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(folder: Folder) -> bool:
    """Whether somebody saves or prunes under the name of this folder."""
    try:
        descriptor = folder.open_file(LOCK, os.O_RDONLY)
    except SnapshotNotFound:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        log.debug("whether %s is locked cannot be told: %s", folder.path / LOCK, error)
        return False
    finally:
        os.close(descriptor)


def lock_for_reading(folder: Folder, name: str) -> int:
    """Open a file, and see to it that nobody removes the snapshot until the descriptor is closed.

    Raises:
        SnapshotNotFound: It is not there.
        SnapshotBusy: The snapshot is being removed.
    """
    descriptor = folder.open_file(name, os.O_RDONLY)
    try:
        if not _try(descriptor, fcntl.LOCK_SH):
            raise SnapshotBusy(f"{folder.path} is being removed", hint="Restore another version.")
    except OSError as error:
        # To read what is there is right also where nothing can be locked: whoever removes it refuses to without a lock.
        log.info("%s cannot be locked for reading: %s", folder.path / name, error)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def lock_for_removing(folder: Folder, name: str) -> int | None:
    """Open a file whose snapshot nobody reads, and nobody begins to read before the descriptor is closed; None if somebody reads it.

    Raises:
        SnapshotNotFound: It is not there.
        SnapshotError: The file system locks no files.
    """
    descriptor = folder.open_file(name, os.O_RDWR)  # NFS gives an exclusive lock only to who may write
    try:
        with explained("locked", folder.path / name), _lockable(folder):
            if _try(descriptor, fcntl.LOCK_EX):
                return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextlib.contextmanager
def _lockable(folder: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise SnapshotError(
                f"the file system of {folder.path} locks no files: {error.strerror}",
                hint="Save to one that does: local ones do, and NFS from version 4.",
            ) from error
        raise


class NameLock:
    """The right to save and prune under one name in some roots, until it is closed, here and wherever its descriptors were handed to.

    Attributes:
        name: The name.
        roots: In the order in which they were given.
        folders: The name's folder in each root, by the root's id.

    Raises:
        SnapshotBusy: Another process has it.
        SnapshotError: A file system locks no files.
    """

    def __init__(self, roots: Sequence[Root], name: str) -> None:
        check_name(name)
        self.name = name
        self.roots = tuple(roots)
        self.folders: dict[str, Folder] = {}
        self._files: list[tuple[Path, int]] = []
        try:
            deadline = time.monotonic() + PATIENCE_S
            for root in sorted(roots, key=lambda root: root.id):  # in one order, so that of two at once the first one gets all
                self._lock(root, deadline)
        except BaseException:
            self.close()
            raise

    def _lock(self, root: Root, deadline: float) -> None:
        with Folder.open(root.path) as top:
            folder = self.folders[root.id] = top.make(self.name)
            top.sync()
        descriptor = folder.open_file(LOCK, os.O_RDWR | os.O_CREAT)
        self._files.append((folder.path / LOCK, descriptor))
        with explained("locked", folder.path / LOCK), _lockable(folder):
            while not _try(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise SnapshotBusy(f"another process saves or prunes snapshots {self.name!r} in {root.path}", hint="Try again when it has ended.")
                time.sleep(_AGAIN_S)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For processes that write under the name: it stays locked until those have ended too."""
        return tuple(descriptor for _, descriptor in self._files)

    def last_version(self) -> int:
        """The highest version that was ever begun under this name, as far as these roots know; 0 if there was none."""
        found = 0
        for path, descriptor in self._files:
            with explained("read", path):
                text = os.pread(descriptor, _LONGEST_NUMBER, 0).strip()
            found = max(found, int(text) if text.isdigit() else 0)
        return found

    def begin_version(self, version: int) -> None:
        """Write down that a version was begun: its number is never given again, also when it is removed."""
        version = max(version, self.last_version())
        for path, descriptor in self._files:
            with explained("written", path):
                os.pwrite(descriptor, f"{version}\n".encode(), 0)
                os.fsync(descriptor)

    def close(self) -> None:
        """Give it up, as far as this process has it. Idempotent."""
        while self._files:
            os.close(self._files.pop()[1])
        for folder in self.folders.values():
            folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
