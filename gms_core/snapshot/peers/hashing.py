"""Checksums of memory, by the engine that saves: the bytes are copied and hashed as for a save, and written nowhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.engine import StagedTransfer, Tuning
from gms_core.snapshot.manifest import Image
from gms_core.snapshot.peers.peer import PeerMemories
from gms_core.snapshot.plan import pieces
from gms_core.snapshot.staged import cores
from gms_core.snapshot.transfer import File, Job, Memory


def checksums(image: Image, memory: Memory) -> list[int]:
    """xxh3_64 of each block of an image, in their order.

    Args:
        image: Its checksums are not looked at.
        memory: Of the image; it is there.

    Raises:
        TransferFailed: The machine has no room for the buffers.
        GmsError: As the memory says.
    """
    work = list(pieces(image.stripes, image.block_bytes))
    if not work:
        return []
    files = [File(Path(shard.path), shard.root, shard.size) for shard in image.shards]
    job = Job("save", files, work, (), image.block_bytes)
    tuning = Tuning(min(len(work), max(2, min(8, cores()))), 1, 2, image.block_bytes, direct="never")
    found = StagedTransfer(job, memory, PeerMemories(files), _Nowhere(), tuning).finish().checksums
    return [found[piece.block] for piece in work]


class _Nowhere:
    """See `Route`."""

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return _Forgetting()

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return []

    def close(self) -> None:
        """See `Route.close`."""


class _Forgetting:
    """See `Channel`. What is hashed is done with."""

    def __init__(self) -> None:
        self._ended: deque[Buffer] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:  # noqa: ARG002 - the protocol's
        """See `Channel.begin`."""
        self._ended.append(buffer)

    def end(self) -> Buffer:
        """See `Channel.end`."""
        return self._ended.popleft()

    def close(self) -> None:
        """See `Channel.close`."""
