"""``uring``: io_uring, called by its numbers, with the buffers registered: the kernel finds their pages once, not for each read.

On machines of the kind x86-64 alone: the rings that are shared with the kernel need memory barriers elsewhere, which Python has not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
from collections.abc import Sequence

from gms_core.errors import TransferFailed
from gms_core.snapshot.backends.deep import DeepChannel
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel
from gms_core.snapshot.files import JobFiles, ShardFile
from gms_core.snapshot.staged import Pace, StagedBackend
from gms_core.snapshot.system_calls import needed, refusal, system_call
from gms_core.snapshot.transfer import Job, Memory, Probe
from gms_core.vmm.undo import UndoStack

_READ_FIXED, _WRITE_FIXED, _READ, _WRITE = 4, 5, 22, 23
_SINGLE_MMAP = 1
_SQES_OFFSET = 0x10000000
_ENTER_GETEVENTS = 1
_ASYNC = 1 << 4
_REGISTER_BUFFERS = 0
_SQE = struct.Struct("=BBHiQQIIQHHi16x")
"""Opcode, flags, priority, descriptor, position, address, size, flags of the read, the request's name, the registered buffer's number, two more."""
_CQE = struct.Struct("=QiI")
_WORD = struct.Struct("I")


class _Parameters(ctypes.Structure):
    """``struct io_uring_params`` of ``linux/io_uring.h``."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("sq_entries", "cq_entries", "flags", "sq_thread_cpu", "sq_thread_idle", "features", "wq_fd")),
        ("reserved", ctypes.c_uint32 * 3),
        *((f"sq_{name}", ctypes.c_uint32) for name in ("head", "tail", "mask", "ring_entries", "ring_flags", "dropped", "array", "reserved")),
        ("sq_user", ctypes.c_uint64),
        *((f"cq_{name}", ctypes.c_uint32) for name in ("head", "tail", "mask", "ring_entries", "overflow", "cqes", "ring_flags", "reserved")),
        ("cq_user", ctypes.c_uint64),
    )


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("size", ctypes.c_uint64))


class UringQueue:
    """See `KernelQueue`.

    Args:
        writes: Whether it writes.
        buffers: The thread's.

    Raises:
        TransferFailed: The kernel refuses.
    """

    def __init__(self, writes: bool, buffers: Sequence[Buffer]) -> None:
        self._enter = needed("io_uring_enter")
        self._closed = False
        self._numbers = {buffer.number: place for place, buffer in enumerate(buffers)}
        try:
            with UndoStack() as undo:
                self._parameters = parameters = _Parameters()
                self._descriptor = system_call(needed("io_uring_setup"), len(buffers), ctypes.addressof(parameters))
                undo.push(os.close, self._descriptor)
                if not parameters.features & _SINGLE_MMAP:
                    raise TransferFailed("this kernel's io_uring is too old: it needs Linux 5.4", hint="Use the backend 'staged'.")
                end = max(parameters.sq_array + 4 * parameters.sq_entries, parameters.cq_cqes + _CQE.size * parameters.cq_entries)
                self._rings = mmap.mmap(self._descriptor, end, flags=mmap.MAP_SHARED)
                undo.push(self._rings.close)
                self._sqes = mmap.mmap(self._descriptor, _SQE.size * parameters.sq_entries, flags=mmap.MAP_SHARED, offset=_SQES_OFFSET)
                undo.push(self._sqes.close)
                self.is_registered = self._register(buffers)
                undo.commit()
        except OSError as error:
            raise TransferFailed(f"io_uring cannot be set up: {error.strerror}", hint="Use the backend 'staged'.") from error
        fixed, plain = (_WRITE_FIXED, _WRITE) if writes else (_READ_FIXED, _READ)
        self._opcode = fixed if self.is_registered else plain

    def submit(self, buffer: Buffer, size: int, file: ShardFile, position: int) -> None:
        """See `KernelQueue.submit`. What goes through the page cache is copied by threads of the kernel, all at once, and not by this one."""
        parameters = self._parameters
        tail = self._word(parameters.sq_tail)
        place = tail & self._word(parameters.sq_mask)
        flags, place_of_buffer = 0 if file.is_direct else _ASYNC, self._numbers[buffer.number]
        request = (self._opcode, flags, 0, file.descriptor, position, buffer.address, size, 0, buffer.number, place_of_buffer, 0, 0)
        _SQE.pack_into(self._sqes, place * _SQE.size, *request)
        _WORD.pack_into(self._rings, parameters.sq_array + 4 * place, place)
        _WORD.pack_into(self._rings, parameters.sq_tail, (tail + 1) & 0xFFFFFFFF)
        try:
            system_call(self._enter, self._descriptor, 1, 0, 0, 0, 0)
        except OSError:
            # The kernel has not looked at it: it must not, later, when the buffer is used for something else.
            _WORD.pack_into(self._rings, parameters.sq_tail, tail)
            raise

    def reap(self) -> list[tuple[int, int]]:
        """See `KernelQueue.reap`."""
        parameters, found = self._parameters, list[tuple[int, int]]()
        head = self._word(parameters.cq_head)
        while head == self._word(parameters.cq_tail):
            system_call(self._enter, self._descriptor, 0, 1, _ENTER_GETEVENTS, 0, 0)
        while head != self._word(parameters.cq_tail):
            place = parameters.cq_cqes + _CQE.size * (head & self._word(parameters.cq_mask))
            name, result, _ = _CQE.unpack_from(self._rings, place)
            found.append((name, result))
            head = (head + 1) & 0xFFFFFFFF
        _WORD.pack_into(self._rings, parameters.cq_head, head)
        return found

    def close(self) -> None:
        """See `KernelQueue.close`."""
        if not self._closed:
            self._closed = True
            self._rings.close()
            self._sqes.close()
            os.close(self._descriptor)

    def _word(self, offset: int) -> int:
        return int(_WORD.unpack_from(self._rings, offset)[0])

    def _register(self, buffers: Sequence[Buffer]) -> bool:
        vectors = (_Vector * len(buffers))(*(_Vector(buffer.address, len(buffer.view)) for buffer in buffers))
        try:
            system_call(needed("io_uring_register"), self._descriptor, _REGISTER_BUFFERS, ctypes.addressof(vectors), len(buffers))
        except OSError:  # a limit on locked memory, most often; it goes without, a little slower
            return False
        return True


class UringRoute:
    """See `Route`."""

    def __init__(self, job: Job, files: JobFiles, memory: Memory) -> None:  # noqa: ARG002 - as every backend's
        self._direction = job.direction
        self._unregistered = False

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        queue = UringQueue(self._direction == "save", buffers)
        self._unregistered |= not queue.is_registered
        return DeepChannel(self._direction, queue)

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return ["io_uring could not register the buffers: raise the limit on locked memory, ulimit -l"] if self._unregistered else []

    def close(self) -> None:
        """See `Route.close`."""


def _probe() -> Probe:
    if platform.machine() != "x86_64":
        return Probe(False, f"it is written for machines of the kind x86_64, not {platform.machine()}")
    return refusal("io_uring_setup", 1)


URING = StagedBackend("uring", _probe, UringRoute, Pace(8, 4, 4 * 2**20), in_memory=Pace(1, 20, 4 * 2**20), is_deep=True)
