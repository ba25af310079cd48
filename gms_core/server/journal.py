"""The file from which the next device server learns what this one knew: values under names, appended, checksummed, and compacted now and then.

A record holds changes that belong together: they are all there afterwards, or none is. What was appended before a kill is read back after it; what a
kill tore is at the end, has never been acknowledged, and is left out. Space is reserved before it is needed, so that a disk that is full refuses a
request instead of breaking one that is half done.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import msgspec

from gms_core.errors import JournalDamaged, JournalUnavailable, PermissionRefused
from gms_core.private_files import open_private

log = logging.getLogger(__name__)

MAGIC = b"GMSJRNL1"
_HEADER = struct.Struct("!III")
"""Bytes of the content, its CRC-32, and the CRC-32 of these two."""
ROOM = 256 * 1024
"""Bytes that are always reserved: for changes that nobody can refuse, such as the end of a process."""
COMPACT_FROM = 2**20
"""Bytes below which a file is not compacted."""

Values = dict[str, bytes]
_decoder = msgspec.msgpack.Decoder(dict[str, bytes | None])
_encoder = msgspec.msgpack.Encoder()


class Journal:
    """Values by name, in a file of this process's own.

    Attributes:
        values: What is in it now.
    """

    def __init__(self, path: Path) -> None:
        """Open the journal at a path, which is made if it is not there.

        Raises:
            JournalDamaged: What is there is not, or no longer, a journal. Nothing was changed.
            JournalUnavailable: It cannot be read, or there is no room for a new one.
        """
        self._path = path
        self._file = -1
        self._end = self._reserved = 0
        self._behind = False
        self.values: Values = {}
        try:
            self._file = open_private(path, os.O_RDWR)
        except FileNotFoundError:
            self._rewrite()
            return
        except PermissionRefused as error:
            raise JournalUnavailable(f"the journal {path} cannot be used: {error.message}", hint=error.hint) from error
        except OSError as error:
            raise _unavailable(path, error) from error
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    @classmethod
    def replacing(cls, path: Path) -> Self:
        """An empty journal in the place of whatever is at a path, which is kept beside it with the suffix ``.damaged``."""
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(".damaged"))
        return cls(path)

    def reserve(self, size: int = 0) -> None:
        """Make sure that changes of so many bytes, and some small ones after them, can be appended.

        Raises:
            JournalUnavailable: There is no room for them. Nothing was changed.
        """
        self.catch_up()
        wanted = self._end + size + ROOM
        if wanted <= self._reserved:
            return
        try:
            os.posix_fallocate(self._file, 0, wanted + ROOM)
        except OSError as error:
            raise _unavailable(self._path, error) from error
        self._reserved = wanted + ROOM

    def catch_up(self) -> None:
        """Write what could not be written before, if anything could not.

        Raises:
            JournalUnavailable: It still cannot be.
        """
        if self._behind:
            self._rewrite()

    def append(self, changes: Mapping[str, bytes | None], *, synced: bool = False) -> None:
        """Append changes in one record: values to set, or None for those to remove.

        Args:
            changes: By name.
            synced: Whether they have to be on the disk, and not only with the kernel: a kill of this process takes nothing of that away.

        Raises:
            JournalUnavailable: They could not be written. They are in `values` all the same, and are written with the next ones.
        """
        for name, value in changes.items():
            if value is None:
                self.values.pop(name, None)
            else:
                self.values[name] = value
        if self._behind:
            self._rewrite()
            return
        record = _record(changes)
        try:
            _write(self._file, record, self._end)
            if synced:
                os.fdatasync(self._file)
        except OSError as error:
            self._behind = True
            raise _unavailable(self._path, error) from error
        self._end += len(record)
        self._reserved = max(self._reserved, self._end)
        if self._end > COMPACT_FROM and self._end > 2 * self.live_bytes:
            with contextlib.suppress(JournalUnavailable):  # the long file is as good as a short one
                self._rewrite()

    @property
    def live_bytes(self) -> int:
        """Bytes that a compacted file has."""
        return len(MAGIC) + sum(_HEADER.size + len(name) + len(value) + 16 for name, value in self.values.items())

    def _load(self) -> None:
        try:
            content = _read(self._file)
        except OSError as error:
            raise _unavailable(self._path, error) from error
        if not content.startswith(MAGIC):
            raise JournalDamaged(f"{self._path} is not a journal of a device server")
        end = len(MAGIC)
        for end, changes in _records(content, self._path):  # noqa: B007 - the last one's end counts
            for name, value in changes.items():
                if value is None:
                    self.values.pop(name, None)
                else:
                    self.values[name] = value
        self._end, self._reserved = end, len(content)
        if content[end:].lstrip(b"\0"):
            self._rewrite()  # what comes after the torn record's place has to be zeros, or else the next one seems to be damaged

    def _rewrite(self) -> None:
        """Write all values to a new file, and put it in the place of this one."""
        staging = self._path.with_suffix(".jnew")
        file = -1
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staging)  # of a server that was killed meanwhile
            file = open_private(staging, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            content = b"".join([MAGIC, *(_record({name: value}) for name, value in self.values.items())])
            os.posix_fallocate(file, 0, len(content) + 2 * ROOM)
            _write(file, content, 0)
            os.fdatasync(file)
            os.rename(staging, self._path)
        except OSError as error:
            if file >= 0:
                os.close(file)
                with contextlib.suppress(OSError):
                    os.unlink(staging)
            raise _unavailable(self._path, error) from error
        self.close()
        self._file, self._end, self._reserved, self._behind = file, len(content), len(content) + 2 * ROOM, False
        try:
            _sync_directory(self._path.parent)
        except OSError as error:  # this file is the journal now, but after a power cut it might be the old one
            self._behind = True
            raise _unavailable(self._path, error) from error

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Close and delete the file: there is nothing to adopt."""
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _record(changes: Mapping[str, bytes | None]) -> bytes:
    content = _encoder.encode(changes)
    start = struct.pack("!II", len(content), zlib.crc32(content))
    return start + struct.pack("!I", zlib.crc32(start)) + content


def _records(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """The records of a file, each with where it ends.

    Raises:
        JournalDamaged: Something before the end is not as it was written.
    """
    view, at = memoryview(content), len(MAGIC)
    while True:
        header = view[at : at + _HEADER.size]
        if len(header) < _HEADER.size or not any(header):
            if any(view[at:].tobytes().lstrip(b"\0")):
                raise JournalDamaged(f"{path} goes on after a gap at byte {at}")
            return
        size, checksum, header_checksum = _HEADER.unpack(header)
        whole = zlib.crc32(header[:8]) == header_checksum
        end = at + _HEADER.size + size
        body = view[at + _HEADER.size : end]
        if not whole or len(body) < size or zlib.crc32(body) != checksum:
            after = view[end:] if whole else view[at + _HEADER.size :]
            if any(after.tobytes().lstrip(b"\0")):
                raise JournalDamaged(f"the record at byte {at} of {path} is not as it was written")
            log.warning("%s ends with a record that is not whole, at byte %d: it was never acknowledged", path, at)
            return
        try:
            changes = _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise JournalDamaged(f"the record at byte {at} of {path} cannot be understood: {error}") from error
        yield end, changes
        at = end


def _read(file: int) -> bytes:
    size, pieces, at = os.fstat(file).st_size, [], 0
    while at < size and (piece := os.pread(file, min(size - at, 2**26), at)):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def _write(file: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _unavailable(path: Path, error: OSError) -> JournalUnavailable:
    hint = "Make room there." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return JournalUnavailable(f"the journal {path} cannot be used: {error.strerror}", hint=hint)
