"""What the threads of a transfer move, and through what: shards that are open, chunks of them, and a thread's channel to them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from gms_core.errors import GmsError
from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.transfer import Where


class OpenFile(Protocol):
    """A shard that is open: a file, or an object of a store."""

    @property
    def path(self) -> Where:
        """Where it lies."""

    def read(self, view: memoryview, position: int) -> None:
        """Fill a view from a position on, whatever number of calls that takes.

        Raises:
            SnapshotDamaged: It ends before.
            TransferFailed: It could not be read.
        """

    def write(self, view: memoryview, position: int) -> None:
        """Write a view to a position.

        Raises:
            TransferFailed: It could not be written.
        """

    def damaged(self, position: int, size: int, found: int, saved: int) -> GmsError:
        """The error for a block that has another checksum than it had."""


class OpenFiles(Protocol):
    """The shards of a job that any of its pieces lies in, open."""

    def __getitem__(self, index: int) -> OpenFile: ...

    def notes(self) -> list[str]:
        """What a user should know of how they were used."""

    def close(self) -> None:
        """Close them. Idempotent."""


class Chunk(NamedTuple):
    """What is read or written at once: a block, or a part of one.

    Attributes:
        piece: The block.
        offset: Bytes from the image's begin.
        size: Bytes.
        file: Where it lies.
        position: Bytes from the file's begin.
    """

    piece: Piece
    offset: int
    size: int
    file: OpenFile
    position: int

    @property
    def is_first(self) -> bool:
        """Whether its block begins with it."""
        return self.offset == self.piece.offset

    @property
    def is_last(self) -> bool:
        """Whether its block is whole with it."""
        return self.offset + self.size == self.piece.offset + self.piece.size


class Channel(Protocol):
    """One thread's way between files and buffers. Chunks end in the order in which they were begun."""

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """Begin to read a chunk, or to write it; a channel may also do it at once.

        Raises:
            SnapshotDamaged: The file is too short.
            TransferFailed: The kernel could not.
        """

    def end(self) -> Buffer:
        """Wait for the chunk that was begun first. Returns where its bytes are: in its buffer, or in a place that stays until `close`.

        Raises:
            SnapshotDamaged: The file is too short.
            TransferFailed: The kernel could not.
        """

    def close(self) -> None:
        """Come back once nothing goes on in any buffer. Copies have ended before. Idempotent."""
