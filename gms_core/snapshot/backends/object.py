"""``object``: shards that are objects of S3, Google Cloud Storage, Azure Blob Storage or a store that speaks like one of them.

Restoring, each thread asks for one range after the other, which arrives in its buffers; many threads make many connections, and that is what such
stores are fast by. Saving, each object is written by one thread, as an upload of several parts: several of them are under way at once, each from the
buffer that it was copied to, and a buffer is used again when the library has let go of it. So what a transfer needs of memory is its buffers, and
beside those about 2 MiB for each thread when restoring, and next to nothing when saving.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import cast

from gms_core.errors import InvalidArgument, TransferFailed
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel, Chunk, OpenFile
from gms_core.snapshot.engine import StagedTransfer, Tuning
from gms_core.snapshot.objects import bucket
from gms_core.snapshot.objects.bucket import Bucket, ShardObject
from gms_core.snapshot.objects.urls import MOST_PARTS, locate, smallest_part
from gms_core.snapshot.staged import BOTH, HASH, LARGEST_CHUNK, check_pieces, choice, cores, number_of
from gms_core.snapshot.transfer import Direction, Job, Memory, Probe, Transfer
from gms_core.vmm.undo import UndoStack

CHUNK_BYTES = 8 * 2**20
"""Asked for, or sent as a part, at once: what stores recommend, and a part of a block."""
CONNECTIONS = 32
"""At most, if nothing else is said."""
SAVERS = 8
"""Objects that are written at once, if nothing else is said."""
MARGIN_S = 60.0
"""Seconds beside those for which the library may try to send a part."""
_AGAIN_S, _AT_MOST_S = 0.001, 0.02
"""Between two looks whether it has done so: the first ones, and the later ones."""


class _Shards:
    """The objects of a job, by the numbers that pieces have."""

    def __init__(self, job: Job, tuning: Tuning) -> None:
        buckets: dict[str, Bucket] = {}
        self._open: dict[int, ShardObject] = {}
        for index in sorted({piece.shard for piece in job.pieces}):
            url, size = str(job.files[index].path), job.files[index].size
            base, key = locate(url)
            if base not in buckets:
                buckets[base] = Bucket(base)
            self._open[index] = buckets[base].open_shard(key, size, tuning.chunk_bytes, tuning.depth)

    def __getitem__(self, index: int) -> OpenFile:
        return self._open[index]

    def __iter__(self) -> Iterator[ShardObject]:
        return iter(self._open.values())

    def notes(self) -> list[str]:
        """See `OpenFiles.notes`."""
        return []

    def close(self) -> None:
        """See `OpenFiles.close`. Idempotent."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()


class _Route:
    """See `Route`. There is nothing that threads would share."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return _Uploads() if self._direction == "save" else _Downloads()

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return []

    def close(self) -> None:
        """See `Route.close`."""


class _Downloads:
    """See `Channel`. A chunk has ended when it has begun."""

    def __init__(self) -> None:
        self._ended: deque[Buffer] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        chunk.file.read(buffer.view[: chunk.size], chunk.position)
        self._ended.append(buffer)

    def end(self) -> Buffer:
        """See `Channel.end`."""
        return self._ended.popleft()

    def close(self) -> None:
        """See `Channel.close`."""


class _Uploads:
    """See `Channel`. The library reads from a buffer as long as the view that it was given cannot be released."""

    def __init__(self) -> None:
        self._begun: deque[tuple[Chunk, Buffer, memoryview]] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        view = buffer.view[: chunk.size]
        self._begun.append((chunk, buffer, view))
        chunk.file.write(view, chunk.position)

    def end(self) -> Buffer:
        """See `Channel.end`. The last part of an object comes back when the object is complete."""
        chunk, buffer, view = self._begun[0]
        shard = cast(ShardObject, chunk.file)
        if chunk.position + chunk.size == shard.size:
            shard.complete()
        self._wait(shard, view, time.monotonic() + _patience_s(shard))
        self._begun.popleft()
        return buffer

    def close(self) -> None:
        """See `Channel.close`. Objects that are not complete are given up."""
        for chunk, _, _ in self._begun:
            cast(ShardObject, chunk.file).close()
        began = time.monotonic()  # all of them are given up at once, so one time is enough for all
        while self._begun:
            chunk, _, view = self._begun[0]
            shard = cast(ShardObject, chunk.file)
            self._wait(shard, view, began + _patience_s(shard))
            self._begun.popleft()

    @staticmethod
    def _wait(shard: ShardObject, view: memoryview, deadline: float) -> None:
        pause = _AGAIN_S
        while True:
            try:
                view.release()
            except BufferError:
                if time.monotonic() > deadline:
                    raise TransferFailed(f"{shard.path} cannot be written: obstore has sent a part of it neither well nor in vain in time") from None
                time.sleep(pause)
                pause = min(2 * pause, _AT_MOST_S)
            else:
                return


class ObjectBackend:
    """See `TransferBackend`.

    Options of a job: ``chunk_bytes``, asked for or sent at once, of which a block is a multiple; ``depth``, parts of one object that are under way at
    once when saving; ``buffers`` of each thread.

    Attributes:
        name: What users call it.
        directions: Both.
        objects: True: it moves objects, and no files.
    """

    name = "object"
    directions = BOTH
    objects = True

    def probe(self) -> Probe:
        """See `TransferBackend.probe`."""
        return bucket.probe()

    def check(self, job: Job) -> None:
        """See `TransferBackend.check`.

        Raises:
            InvalidArgument: The job contradicts itself, has an option that the backend does not know, or objects of too many parts.
        """
        check_pieces(job)
        tuning = self._tuning(job)
        if job.direction == "save":
            _check_parts(job, tuning.chunk_bytes)

    def open(self, job: Job, memory: Memory) -> Transfer:
        """See `TransferBackend.open`.

        Raises:
            InvalidArgument: See `check`.
            BackendUnavailable: The library is not installed.
            PermissionRefused: Nothing says whose store it is.
            TransferFailed: The machine has no room for the buffers, or the store's settings contradict each other.
        """
        self.check(job)
        tuning = self._tuning(job)
        with UndoStack() as undo:
            shards = _Shards(job, tuning)
            undo.push(shards.close)
            transfer = StagedTransfer(job, memory, shards, _Route(job.direction), tuning)
            undo.commit()
        return transfer

    def _tuning(self, job: Job) -> Tuning:
        saves = job.direction == "save"
        known = {"chunk_bytes", "buffers"} | ({"depth"} if saves else {"hash"})
        if unknown := sorted(job.options.keys() - {"chunk_bytes", "buffers", "depth", "hash"}):
            raise InvalidArgument(f"the backend {self.name!r} has no option {unknown[0]!r}", hint=f"It has {', '.join(sorted(known))}.")
        if job.workers < 0:
            raise InvalidArgument(f"{job.workers} threads cannot be started")
        chunk = number_of(job, "chunk_bytes", min(CHUNK_BYTES, job.block_bytes), 1, LARGEST_CHUNK)
        if job.block_bytes % chunk:
            raise InvalidArgument(f"the option chunk_bytes={chunk} is no part of a block of {job.block_bytes} bytes without a rest")
        units = len({piece.shard for piece in job.pieces}) if saves else len(job.pieces)
        workers = min(job.workers or (SAVERS if saves else min(CONNECTIONS, 4 * cores())), max(1, units))
        parts = -(-max((file.size for file in job.files), default=chunk) // chunk)
        depth = number_of(job, "depth", max(1, min(CONNECTIONS // workers, parts)), 1, 256) if saves else 1
        buffers = number_of(job, "buffers", depth + (2 if saves else 1), depth, 1024)
        return Tuning(workers, depth, buffers, chunk, direct="never", in_order=saves, hash_on_device=choice(job, "hash", HASH))


def _patience_s(shard: ShardObject) -> float:
    """Seconds after which the library has sent a part, or has failed to: its last try begins within `bucket.RETRY_S`."""
    return bucket.RETRY_S + bucket.timeout_s(shard.path) + MARGIN_S


def _check_parts(job: Job, chunk_bytes: int) -> None:
    for file in job.files:
        if file.size > chunk_bytes * MOST_PARTS:
            raise InvalidArgument(
                f"{file.path} would have more than {MOST_PARTS} parts of {chunk_bytes} bytes",
                hint="Use a smaller --shard-size, or a larger chunk_bytes.",
            )
        if file.size > chunk_bytes and chunk_bytes < smallest_part(str(file.path)):
            raise InvalidArgument(f"the option chunk_bytes={chunk_bytes} is less than stores accept as a part, {smallest_part(str(file.path))} bytes")


OBJECT = ObjectBackend()
