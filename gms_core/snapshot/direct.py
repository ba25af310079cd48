"""One thread of a restore whose bytes go straight from files into the device's memory. Its buffers only serve to look at what has arrived.

Nothing passes this process on the way, so a checksum can only be one of the memory: every chunk is copied back from there and hashed, while the next
ones arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.worker import Worker

_UNREADABLE = memoryview(b"")
"""Of a device's memory the CPU has no view."""


class DirectWorker(Worker):
    """See `Worker`. Its channel is given places in the device's memory for buffers; they have the numbers of the thread's buffers, and no view."""

    def _restore(self, channel: Channel) -> None:
        orders, lane = self._orders, self._orders.lane
        lane.arrive()
        orders.pin()
        self._lap("arrive")
        idle, begun = deque(orders.buffers), deque[tuple[Chunk, Buffer]]()
        parts = self._parts()
        upcoming = next(parts, None)
        while upcoming or begun:
            while upcoming and idle and len(begun) < orders.depth:
                chunk, address = upcoming
                buffer = idle.popleft()
                channel.begin(chunk, Buffer(buffer.number, address, _UNREADABLE))
                begun.append((chunk, buffer))
                upcoming = next(parts, None)
            chunk, buffer = begun.popleft()
            channel.end()
            self._lap("read")
            lane.wait(lane.from_memory(buffer.address, chunk.offset, chunk.size))
            self._lap("copy")
            self._verify(chunk, buffer.view)
            self.moved += chunk.size
            idle.append(buffer)

    def _parts(self) -> Iterator[tuple[Chunk, int]]:
        """The chunks, cut where the memory is not contiguous, and the address of each."""
        for chunk in self._chunks():
            done = 0
            for place in self._orders.places(chunk.offset, chunk.size):
                yield Chunk(chunk.piece, chunk.offset + done, place.size, chunk.file, chunk.position + done), place.address
                done += place.size
