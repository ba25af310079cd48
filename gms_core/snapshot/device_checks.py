"""What one thread of a restore has its device compare: blocks, as they lie in the device's memory, with the checksums that they were saved with.

Several blocks are hashed at once, as beginning that takes the host as long as several copies do. Copies go on meanwhile, and before: until the device
can hash, which may take a driver a while, blocks are gathered.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import xxhash

from gms_core.errors import GmsError, TransferFailed
from gms_core.snapshot.buffers import Ring
from gms_core.snapshot.chunks import Chunk, OpenFile
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.transfer import CopyLane, LaneHash


class DeviceChecks:
    """The blocks of one thread.

    Attributes:
        found: The checksums of those that were compared, by the block's number.
        refused: Whether the device hashes nothing after all: the host has to, from the next block on.

    Args:
        lane: Its thread's; copies are begun in it.
        hashing: The lane's.
        saved: The checksum of every block of the job, by its number.
    """

    def __init__(self, lane: CopyLane, hashing: LaneHash, saved: Sequence[int]) -> None:
        self.found: dict[int, int] = {}
        self.refused = False
        self._lane = lane
        self._hashing = hashing
        self._saved = saved
        self._gathered: deque[tuple[Piece, OpenFile]] = deque()
        self._begun: tuple[list[tuple[Piece, OpenFile]], int] | None = None

    def add(self, chunk: Chunk) -> None:
        """Take up the block that a chunk is the last one of, once all copies of it are begun.

        Raises:
            SnapshotDamaged: Another block is not what was saved; the message names file and position.
            TransferFailed: Or it is, in its file, and is something else in the memory.
        """
        self._gathered.append((chunk.piece, chunk.file))
        if len(self._gathered) >= self._hashing.at_once and self._hashing.is_ready:
            self._begin()

    def finish(self) -> None:
        """Compare all that has not been.

        Raises:
            SnapshotDamaged: See `add`.
            TransferFailed: See `add`.
        """
        while self._gathered:
            self._begin()
        self._end()

    def _begin(self) -> None:
        """Have the next blocks hashed, and compare those before them meanwhile."""
        blocks = [self._gathered.popleft() for _ in range(min(len(self._gathered), self._hashing.at_once))]
        ticket = self._hashing.begin([(piece.offset, piece.size) for piece, _ in blocks])
        if ticket is None:
            self.refused = True
            for piece, file in blocks:
                self._compare(piece, file, self._read_back(piece))
            return
        self._end()
        self._begun = blocks, ticket

    def _end(self) -> None:
        if self._begun is None:
            return
        (blocks, ticket), self._begun = self._begun, None
        for (piece, file), found in zip(blocks, self._hashing.end(ticket), strict=True):
            self._compare(piece, file, found)

    def _compare(self, piece: Piece, file: OpenFile, found: int) -> None:
        """Compare a checksum with what was saved. If they differ, say whether it is the file that has changed."""
        saved = self._saved[piece.block]
        self.found[piece.block] = found
        if found == saved:
            return
        try:
            read = _read_again(file, piece)
        except GmsError as error:
            raise file.damaged(piece.position, piece.size, found, saved) from error
        if read != saved:
            raise file.damaged(piece.position, piece.size, read, saved)
        raise TransferFailed(
            f"the {piece.size} bytes at position {piece.position} of {file.path} have the checksum {found:016x} in the device's memory; "
            f"read once more they have {saved:016x}, with which they were saved: they were read wrongly, or changed on the way",
            hint="Nothing is published. Try again; if it fails again, look at the kernel's log, and at nvidia-smi -q for ECC errors.",
            details={"file": str(file.path), "position": str(piece.position)},
        )

    def _read_back(self, piece: Piece) -> int:
        """The checksum of a block in a device's memory that the device cannot find."""
        with contextlib.closing(Ring(1, piece.size)) as ring:
            buffer = ring.buffers[0]
            self._lane.wait(self._lane.from_memory(buffer.address, piece.offset, piece.size))
            return xxhash.xxh3_64_intdigest(buffer.view[: piece.size])


def _read_again(file: OpenFile, piece: Piece) -> int:
    """The checksum of a block where it lies."""
    with contextlib.closing(Ring(1, piece.size)) as ring:
        view = ring.buffers[0].view[: piece.size]
        file.read(view, piece.position)
        return xxhash.xxh3_64_intdigest(view)
