"""``staged``: plain `preadv` and `pwritev` in threads. It needs nothing and works in every sandbox, and with huge pages nothing is faster."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.files import JobFiles
from gms_core.snapshot.staged import Pace, StagedBackend
from gms_core.snapshot.transfer import Direction, Job, Memory, Probe


class PreadvRoute:
    """See `Route`. There is nothing that threads would share."""

    def __init__(self, job: Job, files: JobFiles, memory: Memory) -> None:  # noqa: ARG002 - as every backend's
        self._direction = job.direction

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return PreadvChannel(self._direction)

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return []

    def close(self) -> None:
        """See `Route.close`."""


class PreadvChannel:
    """See `Channel`. A chunk has ended when it has begun."""

    def __init__(self, direction: Direction) -> None:
        self._saves = direction == "save"
        self._ended: deque[Buffer] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        view = buffer.view[: chunk.size]
        if self._saves:
            chunk.file.write(view, chunk.position)
        else:
            chunk.file.read(view, chunk.position)
        self._ended.append(buffer)

    def end(self) -> Buffer:
        """See `Channel.end`."""
        return self._ended.popleft()

    def close(self) -> None:
        """See `Channel.close`."""


def _probe() -> Probe:
    return Probe(True, "preadv and pwritev, past the page cache where the filesystem has direct I/O")


# The buffers of all threads must find room in the processor's caches: what has to go through memory once more on its
# way to a GPU takes away from what is read there.
_IN_MEMORY = Pace(threads=12, chunk_bytes=4 * 2**20)

STAGED = StagedBackend("staged", _probe, PreadvRoute, Pace(), in_memory=_IN_MEMORY)
