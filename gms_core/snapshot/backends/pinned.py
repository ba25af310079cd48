"""``local-ssd-pinned``: files that are in memory already, on a tmpfs or in the page cache, are pinned and copied where they lie.

No byte goes through a buffer, and no CPU copies any. What is not in memory, or cannot be pinned, is read as by ``staged``.

Files of a snapshot never change. One that is cut all the same, in the moment between the look at its pages and their use, ends this process by a
signal; nothing is published then.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from gms_core.errors import DriverError, TransferFailed
from gms_core.snapshot.buffers import Buffer, MappedFile
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.files import JobFiles, ShardFile, shard_file
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.staged import Pace, StagedBackend
from gms_core.snapshot.transfer import Job, Memory, Probe
from gms_core.vmm.undo import UndoStack


class PinnedRoute:
    """See `Route`. It maps each file once for all threads."""

    def __init__(self, job: Job, files: JobFiles, memory: Memory) -> None:
        self._memory = memory
        self._from_disk = job.from_disk
        self._lock = threading.Lock()
        self._refused = ""
        self._in_place = self._through_buffers = 0
        self._mapped: dict[ShardFile, MappedFile] = {}
        with UndoStack() as undo:
            undo.push(self.close)
            for file in files:
                try:
                    self._mapped[file] = MappedFile(file.descriptor, file.size)
                except OSError as error:
                    raise TransferFailed(f"{file.path} cannot be mapped: {error.strerror}", hint="Use the backend 'staged'.") from error
            undo.commit()

    def channel(self, buffers: Sequence[Buffer]) -> Channel:  # noqa: ARG002 - they are used as a chunk needs them
        """See `Route.channel`."""
        return _PinnedChannel(self, self._memory)

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        notes = [f"files cannot be pinned where they lie: {self._refused}"] if self._refused else []
        if self._through_buffers and not self._from_disk:
            notes.append(f"{self._through_buffers} of {self._in_place + self._through_buffers} bytes were read into buffers: they were not in memory")
        return notes

    def close(self) -> None:
        """See `Route.close`."""
        while self._mapped:
            self._mapped.popitem()[1].close()

    def in_place(self, chunk: Chunk) -> Buffer | None:
        """Where a chunk lies in memory; None if it does not, or it is the disk that is asked."""
        if self._from_disk:
            return None
        mapped = self._mapped[shard_file(chunk.file)]
        if self._refused or not mapped.is_resident(chunk.position, chunk.size) or not mapped.populate(chunk.position, chunk.size):
            return None
        return mapped.part(chunk.position, chunk.size)

    def refused(self, error: DriverError) -> None:
        """The device's driver does not pin files: it is not asked again."""
        self._refused = error.message

    def count(self, size: int, *, in_place: bool) -> None:
        """Note how a chunk was read."""
        with self._lock:
            if in_place:
                self._in_place += size
            else:
                self._through_buffers += size


class _PinnedChannel:
    """See `Channel`. What is pinned stays so until all is copied: a device that gives pages up waits for its copies first."""

    def __init__(self, route: PinnedRoute, memory: Memory) -> None:
        self._route, self._memory = route, memory
        self._pinned: list[int] = []
        self._ended: deque[Buffer] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        place = self._route.in_place(chunk)
        if place is not None:
            try:
                self._memory.register(place.address, chunk.size, writable=False)
                self._pinned.append(place.address)
            except DriverError as error:
                self._route.refused(error)
                place = None
        if place is None:
            chunk.file.read(buffer.view[: chunk.size], chunk.position)
        self._route.count(chunk.size, in_place=place is not None)
        self._ended.append(place or buffer)

    def end(self) -> Buffer:
        """See `Channel.end`."""
        return self._ended.popleft()

    def close(self) -> None:
        """See `Channel.close`."""
        with UndoStack() as undo:
            while self._pinned:
                undo.push(self._memory.unregister, self._pinned.pop())


def _probe() -> Probe:
    return Probe(True, "files on a tmpfs or in the page cache are pinned where they lie; others are read as by staged")


PINNED = StagedBackend("local-ssd-pinned", _probe, PinnedRoute, Pace(chunk_bytes=BLOCK_BYTES), directions=frozenset({"restore"}))
