"""``aio``: the kernel's older asynchronous I/O, called by its numbers. A thread has several reads under way, so few threads fill a disk's queue.

Only direct I/O is asynchronous: through the page cache a call to submit waits for the bytes. Once all has arrived, the kernel takes some ten
milliseconds to give up what a thread had here.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence

from gms_core.errors import TransferFailed
from gms_core.snapshot.backends.deep import DeepChannel
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel
from gms_core.snapshot.files import JobFiles, ShardFile
from gms_core.snapshot.staged import Pace, StagedBackend
from gms_core.snapshot.system_calls import needed, refusal, system_call
from gms_core.snapshot.transfer import Job, Memory, Probe

_PREAD, _PWRITE = 0, 1


class _ControlBlock(ctypes.Structure):
    """``struct iocb`` of ``linux/aio_abi.h``, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_int32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("position", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("event_descriptor", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """``struct io_event``."""

    _fields_ = (("data", ctypes.c_uint64), ("control_block", ctypes.c_uint64), ("result", ctypes.c_int64), ("result2", ctypes.c_int64))


class AioQueue:
    """See `KernelQueue`.

    Args:
        writes: Whether it writes.
        buffers: The thread's.

    Raises:
        TransferFailed: The kernel refuses.
    """

    def __init__(self, writes: bool, buffers: Sequence[Buffer]) -> None:
        self._calls = {name: needed(name) for name in ("io_setup", "io_submit", "io_getevents", "io_destroy")}
        self._blocks = {buffer.number: _ControlBlock(data=buffer.number, opcode=_PWRITE if writes else _PREAD) for buffer in buffers}
        self._events = (_Event * len(buffers))()
        context = ctypes.c_ulong(0)
        try:
            system_call(self._calls["io_setup"], len(buffers), ctypes.addressof(context))
        except OSError as error:
            hint = "Raise the limit fs.aio-max-nr, or use the backend 'staged'." if error.errno == errno.EAGAIN else "Use the backend 'staged'."
            raise TransferFailed(f"asynchronous I/O cannot be set up: {error.strerror}", hint=hint) from error
        self._context: int | None = context.value

    def submit(self, buffer: Buffer, size: int, file: ShardFile, position: int) -> None:
        """See `KernelQueue.submit`."""
        block = self._blocks[buffer.number]
        block.descriptor, block.buffer, block.size, block.position = file.descriptor, buffer.address, size, position
        pointer = ctypes.c_uint64(ctypes.addressof(block))
        system_call(self._calls["io_submit"], self._context or 0, 1, ctypes.addressof(pointer))

    def reap(self) -> list[tuple[int, int]]:
        """See `KernelQueue.reap`."""
        count = system_call(self._calls["io_getevents"], self._context or 0, 1, len(self._events), ctypes.addressof(self._events), 0)
        return [(event.data, event.result) for event in self._events[:count]]

    def close(self) -> None:
        """See `KernelQueue.close`."""
        if self._context is not None:
            context, self._context = self._context, None
            system_call(self._calls["io_destroy"], context)


class AioRoute:
    """See `Route`. There is nothing that threads would share."""

    def __init__(self, job: Job, files: JobFiles, memory: Memory) -> None:  # noqa: ARG002 - as every backend's
        self._direction = job.direction

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return DeepChannel(self._direction, AioQueue(self._direction == "save", buffers))

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return []

    def close(self) -> None:
        """See `Route.close`."""


def _probe() -> Probe:
    return refusal("io_setup", 1)


AIO = StagedBackend("aio", _probe, AioRoute, Pace(8, 4, 4 * 2**20), is_deep=True)
