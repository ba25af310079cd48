"""Folders and files of snapshots, reached name by name without following links; what the kernel refuses is told in sentences."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from gms_core.errors import GmsError, PermissionRefused, SnapshotDamaged, SnapshotNotFound, TransferFailed

_LONGEST = 2**30
"""Bytes of a file that is read whole: far more than any manifest has."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_LINK = frozenset({errno.ELOOP, errno.ENOTDIR})
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
"""How file systems answer that cannot sync a folder, and need not."""


HINTS = {
    errno.ENOSPC: "Make room (gms snapshot prune removes old snapshots, and what was left of saves), or add a root.",
    errno.EDQUOT: "Raise the quota of that root, make room (gms snapshot prune removes old snapshots), or add a root.",
    errno.EIO: "The disk has failed: look at the kernel's log, and verify the other snapshots there.",
    errno.EFBIG: "Raise the limit on the size of files, ulimit -f.",
    errno.ETIME: "A disk, or the library that reads from it, hangs: look at the kernel's log. --option deadline_s=N waits longer.",
    errno.EMFILE: "Raise the limit on open files, ulimit -n.",
}
"""What a user can do about it."""


def explain(error: OSError, doing: str, path: Path) -> GmsError:
    """The error that says in a sentence what the kernel refused.

    Args:
        error: The kernel's.
        doing: What was tried, such as ``written``.
        path: With what.
    """
    message = f"{path} cannot be {doing}: {error.strerror or error}"
    if error.errno in _REFUSED:
        return PermissionRefused(message, hint="The user that saves or restores has to own the snapshot, on a file system that it may use so.")
    if error.errno in _LINK:
        return PermissionRefused(f"{path} is a link, or not what it should be, and is not used", hint="Snapshots have no links: remove it.")
    if error.errno == errno.ENOENT:
        return SnapshotNotFound(f"{path} is not there")
    return TransferFailed(message, hint=HINTS.get(error.errno or 0, ""))


@contextlib.contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Raise what `explain` says for each `OSError`."""
    try:
        yield
    except OSError as error:
        raise explain(error, doing, path) from error


def check_owner(found: os.stat_result, path: Path) -> None:
    """Raise `PermissionRefused` unless a file or folder is this user's or root's, and not open to everybody.

    A group may write to it: nobody but the owner can have allowed that, and orchestrators do it to volumes that they mount.
    """
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionRefused(
            f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}",
            hint="Use it as that user, or give it to this one with chown -R; where an export makes root nobody, use another user than root.",
        )
    if found.st_mode & 0o002:
        raise PermissionRefused(f"everybody may write to {path}: its mode is {stat.S_IMODE(found.st_mode):04o}", hint=f"Run: chmod -R o-w {path}")


def give_mode(descriptor: int, mode: int) -> None:
    """Give what was made just now the mode that it should have, whatever the umask is; on file systems that have modes."""
    with contextlib.suppress(OSError):
        found = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if found & 0o777 != mode:
            os.fchmod(descriptor, found & ~0o777 | mode)


class Folder:
    """An open folder: what it is called later does not matter to it.

    Attributes:
        path: Where it was when it was opened, for messages and for those who need a path.
        descriptor: Open.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the folder that a user names: links on the way are the user's business, and so is whose it is.

        Raises:
            SnapshotNotFound: It is not there.
            PermissionRefused: It may not be used, or is no folder.
        """
        with explained("opened", path):
            return cls(path, os.open(path, _FOLDER))

    def child(self, name: str) -> Folder:
        """Open a folder in this one.

        Raises:
            SnapshotNotFound: It is not there.
            PermissionRefused: It is a link or no folder, another user's, or everybody may write to it.
        """
        path = self.path / name
        with explained("opened", path):
            descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor)
        try:
            check_owner(os.fstat(descriptor), path)
        except BaseException:
            os.close(descriptor)
            raise
        return Folder(path, descriptor)

    def make(self, name: str, mode: int = 0o700) -> Folder:
        """Open a folder in this one; it is made if it is not there, and then has this mode."""
        made = False
        with explained("made", self.path / name), contextlib.suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=self.descriptor)
            made = True
        folder = self.child(name)
        if made:
            give_mode(folder.descriptor, mode)
        return folder

    def names(self) -> list[str]:
        """Names of all that is in it."""
        with explained("listed", self.path):
            return sorted(os.listdir(self.descriptor))

    def has(self, name: str) -> bool:
        """Whether something of that name is in it."""
        try:
            os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain(error, "looked at", self.path / name) from error
        return True

    def open_file(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open a regular file; one that is made has this mode. Whoever asks closes the descriptor.

        Raises:
            SnapshotNotFound: It is not there.
            PermissionRefused: It is a link or no regular file, another user's, or everybody may write to it.
        """
        path = self.path / name
        with explained("opened", path):
            descriptor = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode, dir_fd=self.descriptor)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise PermissionRefused(f"{path} is no regular file", hint="Remove it.")
            check_owner(found, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str) -> bytes:
        """All of a small file.

        Raises:
            SnapshotNotFound: It is not there.
            SnapshotDamaged: It is far too long.
            TransferFailed: It cannot be read.
        """
        path = self.path / name
        with explained("read", path), open(self.open_file(name, os.O_RDONLY), "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > _LONGEST:
                raise SnapshotDamaged(f"{path} has more than {_LONGEST} bytes", hint="It is not what a save has written: save the snapshot anew.")
            return file.readall()

    def write(self, name: str, data: bytes, mode: int = 0o600) -> None:
        """Write a small file of this mode whole and for good, or leave what was there: it is synced, and so is its name."""
        path, temporary = self.path / name, f".{name}-{secrets.token_hex(8)}"
        descriptor = self.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with explained("written", path):
                try:
                    give_mode(descriptor, mode)
                    view = memoryview(data)
                    while view:
                        view = view[os.write(descriptor, view) :]
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self.descriptor)
            raise
        self.sync()

    def rename(self, name: str, new: str) -> None:
        """Give a folder in this one another name, for good. Nothing may have that name."""
        if self.has(new):
            raise TransferFailed(f"{self.path / new} is there already", hint="Nothing of gms makes it: move it away.")
        with explained(f"renamed to {new}", self.path / name):
            os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        self.sync()

    def unlink(self, name: str) -> None:
        """Remove a file for good, if it is there."""
        with explained("removed", self.path / name):
            try:
                os.unlink(name, dir_fd=self.descriptor)
            except FileNotFoundError:
                return
        self.sync()

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it, if it is there."""
        with explained("removed", self.path / name), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Make names in it last."""
        with explained("synced", self.path):
            try:
                os.fsync(self.descriptor)
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise

    def sync_all(self) -> None:
        """Make names in it, and in all folders below, last."""
        for name, found in self._look():
            if stat.S_ISDIR(found.st_mode):
                with self.child(name) as folder:
                    folder.sync_all()
        self.sync()

    def files(self) -> dict[str, int]:
        """Bytes of all that is below it and is no folder, by its path from here."""
        sizes: dict[str, int] = {}
        for name, found in self._look():
            if stat.S_ISDIR(found.st_mode):
                with self.child(name) as folder:
                    sizes.update({f"{name}/{path}": size for path, size in folder.files().items()})
            else:
                sizes[name] = found.st_size
        return sizes

    def _look(self) -> Iterator[tuple[str, os.stat_result]]:
        for name in self.names():
            with explained("looked at", self.path / name):
                found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
            yield name, found

    def close(self) -> None:
        """Close it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
