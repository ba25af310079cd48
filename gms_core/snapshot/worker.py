"""One thread of a transfer. It does its whole loop alone: handing work from thread to thread costs more than the work's own bookkeeping.

Restoring: read a chunk into a buffer, begin to copy it to the memory, hash it meanwhile, and go on with the next buffer. A device that can
do it hashes what has arrived, and the host does not. Saving: the reverse, and the host hashes.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import xxhash

from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.chunks import Channel, Chunk, OpenFiles
from gms_core.snapshot.device_checks import DeviceChecks
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.transfer import CopyLane, Job, Place
from gms_core.vmm.undo import UndoStack


class Orders(NamedTuple):
    """What a thread is told.

    Attributes:
        job: Of which it does a part.
        files: The job's.
        take: Gives the next block, or None when there is none left.
        check: Raises when the transfer is to end early.
        channel: Opens the thread's channel.
        lane: The thread's lane.
        places: Tells where a part of the image lies in memory; see `Memory.places`.
        buffers: The thread's own.
        pin: Makes all buffers fit for copies, if they are not yet; called once the memory is there.
        depth: How many chunks may be begun at once.
        chunk_bytes: Of a chunk, at most.
        hash_on_device: Whether a device that can finds the checksums when restoring.
    """

    job: Job
    files: OpenFiles
    take: Callable[[], Piece | None]
    check: Callable[[], None]
    channel: Callable[[Sequence[Buffer]], Channel]
    lane: CopyLane
    places: Callable[[int, int], Sequence[Place]]
    buffers: Sequence[Buffer]
    pin: Callable[[], None]
    depth: int
    chunk_bytes: int
    hash_on_device: bool


class Worker:
    """A thread's part of a job.

    Attributes:
        moved: Bytes that have arrived so far.
        checksums: Of the blocks that it has moved.
        seconds: What its time went to.
        ended: When it had done its last piece of work, as `time.perf_counter` has it.
        released: Whether nothing can touch its buffers any more.
        notes: What a user should know of how it went.
    """

    def __init__(self, orders: Orders) -> None:
        self.moved = 0
        self.checksums: dict[int, int] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ended = 0.0
        self.released = True
        self.notes: set[str] = set()
        self._orders = orders
        self._hash = xxhash.xxh3_64()
        self._since = 0.0

    def run(self) -> None:
        """Do the work, until there is none left.

        Raises:
            GmsError: Why it could not be done; nothing of it is under way any more, unless `released` is False.
        """
        orders = self._orders
        self._since = time.perf_counter()
        channel = orders.channel(orders.buffers)
        self.released = False
        with UndoStack() as undo:
            undo.push(self._close, channel)
            self._lap("prepare")
            if orders.job.direction == "restore":
                self._restore(channel)
            else:
                self._save(channel)
            self.ended = self._since

    def _close(self, channel: Channel) -> None:
        with UndoStack() as undo:
            undo.push(channel.close)
            undo.push(self._orders.lane.close)
        self.released = True

    def _restore(self, channel: Channel) -> None:
        orders, lane = self._orders, self._orders.lane
        idle, begun, copying = deque(orders.buffers), deque[tuple[Chunk, Buffer]](), deque[tuple[Chunk, Buffer, int]]()
        checks, on_device, is_first = None, None, True
        chunks = self._chunks()
        upcoming = next(chunks, None)
        while upcoming or begun:
            while upcoming and len(begun) < orders.depth:
                if not idle:
                    if not copying:
                        break
                    idle.append(self._copied(*copying.popleft()))
                buffer = idle.popleft()
                channel.begin(upcoming, buffer)
                begun.append((upcoming, buffer))
                upcoming = next(chunks, None)
            chunk, buffer = begun.popleft()
            bytes_at = channel.end()
            self._lap("read")
            if is_first:
                lane.arrive()
                checks, is_first = self._device_checks(), False
            if bytes_at is buffer:
                orders.pin()
            self._lap("arrive")
            copying.append((chunk, buffer, lane.to_memory(chunk.offset, bytes_at.address, chunk.size)))
            self._lap("copy")
            if chunk.is_first:
                on_device = None if checks is None or checks.refused else checks
            # A device copies while this is hashed. Wrong bytes are then in memory that nobody is given.
            if on_device is None:
                self._verify(chunk, bytes_at.view)
            elif chunk.is_last:
                on_device.add(chunk)
                self._lap("hash")
        while copying:
            self._copied(*copying.popleft())
        if checks is not None:
            checks.finish()
            self._lap("hash")
            if checks.refused:
                self.notes.add("the GPU could not hash what has arrived, so the host has: its log says why")

    def _save(self, channel: Channel) -> None:
        orders, lane = self._orders, self._orders.lane
        idle, copying, writing = deque(orders.buffers), deque[tuple[Chunk, Buffer, int]](), deque[tuple[Chunk, Buffer]]()
        chunks = self._chunks()
        lane.arrive()
        orders.pin()
        self._lap("wait")
        upcoming = next(chunks, None)
        while upcoming or copying or writing:
            while upcoming and idle:
                buffer = idle.popleft()
                copying.append((upcoming, buffer, lane.from_memory(buffer.address, upcoming.offset, upcoming.size)))
                upcoming = next(chunks, None)
            self._lap("copy")
            if copying:
                chunk, buffer, ticket = copying.popleft()
                lane.wait(ticket)
                self._lap("wait")
                self._digest(chunk, buffer.view)
                channel.begin(chunk, buffer)
                writing.append((chunk, buffer))
            if len(writing) >= orders.depth or not copying:
                chunk, buffer = writing.popleft()
                channel.end()
                self.moved += chunk.size
                idle.append(buffer)
            self._lap("write")

    def _chunks(self) -> Iterator[Chunk]:
        orders = self._orders
        while True:
            orders.check()
            piece = orders.take()
            if piece is None:
                return
            file = orders.files[piece.shard]
            for inside in range(0, piece.size, orders.chunk_bytes):
                orders.check()
                yield Chunk(piece, piece.offset + inside, min(orders.chunk_bytes, piece.size - inside), file, piece.position + inside)

    def _copied(self, chunk: Chunk, buffer: Buffer, ticket: int) -> Buffer:
        self._orders.lane.wait(ticket)
        self.moved += chunk.size
        self._lap("wait")
        return buffer

    def _verify(self, chunk: Chunk, view: memoryview) -> None:
        found = self._digest(chunk, view)
        if found is not None and found != (saved := self._orders.job.checksums[chunk.piece.block]):
            raise chunk.file.damaged(chunk.piece.position, chunk.piece.size, found, saved)

    def _device_checks(self) -> DeviceChecks | None:
        """What has the device find the checksums, if it shall and can. The lane has arrived."""
        hashing = self._orders.lane.hash() if self._orders.hash_on_device else None
        if hashing is None:
            return None
        checks = DeviceChecks(self._orders.lane, hashing, self._orders.job.checksums)
        self.checksums = checks.found
        return checks

    def _digest(self, chunk: Chunk, view: memoryview) -> int | None:
        """Hash a chunk; returns the checksum of its block with the last one."""
        self._hash.update(view[: chunk.size])
        found = None
        if chunk.is_last:
            found = self.checksums[chunk.piece.block] = self._hash.intdigest()
            self._hash.reset()
        self._lap("hash")
        return found

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._since
        self._since = now
