"""A job's files, open past the page cache unless they are in it or their filesystem forbids that, and the errors that name them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gms_core.errors import SnapshotDamaged, SnapshotError, TransferFailed
from gms_core.snapshot.chunks import OpenFile
from gms_core.snapshot.folders import HINTS
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.page_cache import share_in_memory
from gms_core.snapshot.transfer import Direct, Direction, File, Job
from gms_core.vmm.undo import UndoStack

_MOSTLY = 0.5
"""From this part on, a file that is in memory is read there: a disk is read once, if at all, and memory many times as fast."""


class ShardFile:
    """One open file.

    Attributes:
        path: Where it is.
        size: Bytes that it has to have.
        descriptor: It is open for reading, or for writing.
        is_direct: Whether it is read or written past the page cache.
        is_in_memory: Whether it is read through the page cache because most of it was there.
    """

    def __init__(self, file: File, direction: Direction, *, direct: Direct) -> None:
        self.path = Path(file.path)
        self.size = file.size
        self._verb = "read" if direction == "restore" else "written"
        flags = (os.O_RDONLY if direction == "restore" else os.O_WRONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        self.is_direct = direct != "never"
        self.is_in_memory = False
        try:
            try:
                self.descriptor = os.open(self.path, flags | (os.O_DIRECT if self.is_direct else 0))
            except OSError as error:
                if error.errno != errno.EINVAL or not self.is_direct:
                    raise
                self.is_direct = False
                self.descriptor = os.open(self.path, flags)
            found = os.fstat(self.descriptor)
        except OSError as error:
            raise self.failed(0, error) from error
        if direction == "restore" and stat.S_ISREG(found.st_mode) and found.st_size < file.size:
            short = self.too_short()
            self.close()
            raise short
        if direction == "restore" and direct == "auto" and share_in_memory(self.descriptor, file.size) >= _MOSTLY:
            self.is_in_memory = True
            self.leave_direct()

    def read(self, view: memoryview, position: int) -> None:
        """Fill a view from a position on, whatever number of calls that takes.

        Raises:
            SnapshotDamaged: The file ends before.
            TransferFailed: The kernel could not read.
        """
        done = 0
        while done < len(view):
            was_direct = self.is_direct
            try:
                count = os.preadv(self.descriptor, [view[done:] if done else view], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not was_direct:
                    raise self.failed(position + done, error) from error
                self.leave_direct()
                continue
            if count == 0:
                raise self.too_short()
            done += count
            if done % PAGE_BYTES:
                self.leave_direct()  # what is left does not begin at a page

    def write(self, view: memoryview, position: int) -> None:
        """Write a view to a position, whatever number of calls that takes.

        Raises:
            TransferFailed: The kernel could not write.
        """
        done = 0
        while done < len(view):
            was_direct = self.is_direct
            try:
                done += os.pwritev(self.descriptor, [view[done:]], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not was_direct:
                    raise self.failed(position + done, error) from error
                self.leave_direct()
                continue
            if done % PAGE_BYTES:
                self.leave_direct()

    def leave_direct(self) -> None:
        """Use the page cache from now on, in every thread."""
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.is_direct = False

    def failed(self, position: int, error: OSError) -> TransferFailed:
        """The kernel's refusal, with the file's name."""
        number = error.errno or 0
        return TransferFailed(
            f"{self.path} cannot be {self._verb} at position {position}: {os.strerror(number)}",
            hint=HINTS.get(number, ""),
            details={"file": str(self.path), "position": str(position), "errno": errno.errorcode.get(number, str(number))},
        )

    def too_short(self) -> SnapshotError:
        """The file ends where it must not."""
        end = os.fstat(self.descriptor).st_size
        return SnapshotDamaged(
            f"{self.path} ends at position {end}, it must have {self.size} bytes",
            hint="Restore another version of the snapshot, or save it anew.",
            details={"file": str(self.path), "position": str(end)},
        )

    def damaged(self, position: int, size: int, found: int, saved: int) -> SnapshotError:
        """A block has another checksum than it had."""
        return SnapshotDamaged(
            f"{self.path} is damaged: the {size} bytes at position {position} have the checksum {found:016x}, they were saved with {saved:016x}",
            hint="Restore another version of the snapshot, or save it anew; look at the kernel's log for what the disk says."
            + (" It was read from the page cache: --option direct=always asks the disk." if self.is_in_memory else ""),
            details={"file": str(self.path), "position": str(position)},
        )

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)


def shard_file(opened: OpenFile) -> ShardFile:
    """A shard, for those who know that it is a file."""
    assert isinstance(opened, ShardFile)
    return opened


class JobFiles:
    """The files of a job that any of its pieces lies in, open.

    Raises:
        SnapshotDamaged: One is too short.
        TransferFailed: One cannot be opened.
    """

    def __init__(self, job: Job, *, direct: Direct) -> None:
        self._wanted_direct = direct != "never"
        self._open: dict[int, ShardFile] = {}
        self._direction = job.direction
        with UndoStack() as undo:
            for index in sorted({piece.shard for piece in job.pieces}):
                file = ShardFile(job.files[index], job.direction, direct=direct)
                undo.push(file.close)
                self._open[index] = file
            undo.commit()

    def __getitem__(self, index: int) -> ShardFile:
        return self._open[index]

    @property
    def are_in_memory(self) -> bool:
        """Whether all of them are read where they lie in memory."""
        return all(file.is_in_memory for file in self)

    def __iter__(self) -> Iterator[ShardFile]:
        return iter(self._open.values())

    def notes(self) -> list[str]:
        """What a user should know of how they were used."""
        cached = [file.path for file in self._open.values() if not file.is_direct and not file.is_in_memory]
        if not cached or not self._wanted_direct:
            return []
        verb = "read" if self._direction == "restore" else "written"
        return [f"{len(cached)} of {len(self._open)} files were {verb} through the page cache: there is no direct I/O where {cached[0]} lies"]

    def close(self) -> None:
        """Close them. Idempotent."""
        with UndoStack() as undo:
            for index in list(self._open):
                undo.push(self._open.pop(index).close)
