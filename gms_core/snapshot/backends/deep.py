"""Channels that have several reads or writes under way at once, whichever interface of the kernel carries them."""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from gms_core.errors import TransferFailed
from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.chunks import Chunk
from gms_core.snapshot.files import ShardFile, shard_file
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.transfer import Direction

_DONE_PLAINLY = frozenset({errno.EINVAL, errno.EAGAIN, errno.EINTR, errno.EOPNOTSUPP, errno.ECANCELED})
"""Answers to which the plain call is the remedy: it can leave direct I/O, needs no thread of the kernel's, and tells what is really wrong."""


class KernelQueue(Protocol):
    """An interface of the kernel, opened for one thread."""

    def submit(self, buffer: Buffer, size: int, file: ShardFile, position: int) -> None:
        """Begin to read a file into a buffer, or to write it from there. The buffer's number names the request.

        Raises:
            OSError: The kernel has not taken it.
        """

    def reap(self) -> list[tuple[int, int]]:
        """Wait until something has ended. Returns the buffer's number, and bytes or a negative error number, of each.

        Raises:
            OSError: The kernel cannot tell.
        """

    def close(self) -> None:
        """Give it up; nothing is under way. Idempotent."""


@dataclass(slots=True, eq=False)
class _Request:
    chunk: Chunk
    buffer: Buffer
    file: ShardFile
    result: int | None = None


class DeepChannel:
    """See `Channel`.

    Args:
        direction: Whether buffers are filled or written.
        queue: Of this thread; closed at the end.
    """

    def __init__(self, direction: Direction, queue: KernelQueue) -> None:
        self._saves = direction == "save"
        self._queue = queue
        self._begun: deque[_Request] = deque()
        self._under_way: dict[int, _Request] = {}

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        request = _Request(chunk, buffer, shard_file(chunk.file))
        try:
            self._queue.submit(buffer, chunk.size, request.file, chunk.position)
        except OSError as error:
            if error.errno not in _DONE_PLAINLY:
                raise request.file.failed(chunk.position, error) from error
            request.result = -(error.errno or errno.EINVAL)
        else:
            self._under_way[buffer.number] = request
        self._begun.append(request)

    def end(self) -> Buffer:
        """See `Channel.end`."""
        request = self._begun.popleft()
        while request.result is None:
            try:
                self._reap()
            except OSError as error:
                raise request.file.failed(request.chunk.position, error) from error
        self._complete(request, request.result)
        return request.buffer

    def close(self) -> None:
        """See `Channel.close`."""
        try:
            while self._under_way:
                self._reap()
        except OSError as error:
            raise TransferFailed(f"the kernel does not say whether {len(self._under_way)} reads or writes have ended: {error.strerror}") from error
        self._queue.close()

    def _reap(self) -> None:
        for number, result in self._queue.reap():
            self._under_way.pop(number).result = result

    def _complete(self, request: _Request, result: int) -> None:
        """Make a chunk whole that the kernel has only done a part of, or nothing."""
        chunk = request.chunk
        if result == chunk.size:
            return
        if result < 0 and -result not in _DONE_PLAINLY:
            raise request.file.failed(chunk.position, OSError(-result, ""))
        done = max(result, 0) // PAGE_BYTES * PAGE_BYTES
        rest = request.buffer.view[done : chunk.size]
        if self._saves:
            request.file.write(rest, chunk.position + done)
        else:
            request.file.read(rest, chunk.position + done)
