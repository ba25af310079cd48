"""``cufile-gds``: cuFile reads files straight into a GPU's memory, in as many threads as read at once."""

from __future__ import annotations

import functools
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Any

from gms_core.errors import TransferFailed
from gms_core.snapshot.backends.asking import answer, ask
from gms_core.snapshot.backends.cufile_library import bindings, open_driver, refuse_without_kernel_module
from gms_core.snapshot.backends.into_memory import all_places, explained
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.direct import DirectWorker
from gms_core.snapshot.files import JobFiles, ShardFile, shard_file
from gms_core.snapshot.staged import Pace, StagedBackend
from gms_core.snapshot.transfer import Job, Memory, Probe
from gms_core.vmm.undo import UndoStack

NAME = "cufile-gds"


class CuFileRoute:
    """See `Route`. Files and memory are registered once for all threads.

    Args:
        job: See `TransferBackend.open`.
        files: The job's.
        memory: See `TransferBackend.open`.

    Raises:
        BackendUnavailable: The driver does not open.
        TransferFailed: A file is none that cuFile reads directly.
    """

    def __init__(self, job: Job, files: JobFiles, memory: Memory) -> None:
        self._cufile = opened()
        self._places = functools.partial(all_places, job, memory, of_gpu=True, backend=NAME)
        self._lock = threading.Lock()
        self._registered: list[int] = []
        self._refused = ""
        self._begins: list[int] = []
        self.handles: dict[ShardFile, Any] = {}
        with UndoStack() as undo:
            undo.push(self.close)
            for file in files:
                self.handles[file] = self._handle(file)
            undo.commit()

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return CuFileChannel(self, self._cufile, buffers)

    def reach(self, address: int) -> tuple[int, int]:
        """Register the memory, if it is not yet; returns what an address is to cuFile: the begin of what is registered there, and an offset.

        What cuFile does not register, it copies to through memory of its own in the GPU.
        """
        with self._lock:
            if not self._begins:
                for place in self._places():
                    self._begins.append(place.address)
                    try:
                        self._cufile.buf_register(place.address, place.size, 0)
                        self._registered.append(place.address)
                    except self._cufile.cuFileError as error:
                        self._refused = str(error)
                self._begins.sort()
        begin = self._begins[bisect_right(self._begins, address) - 1]
        return begin, address - begin

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return [f"cuFile could not register the memory, and copies to it within the GPU: {self._refused}"] if self._refused else []

    def close(self) -> None:
        """See `Route.close`."""
        with UndoStack() as undo:
            while self.handles:
                undo.push(self._cufile.handle_deregister, self.handles.popitem()[1])
            while self._registered:
                undo.push(self._cufile.buf_deregister, self._registered.pop())

    def _handle(self, file: ShardFile) -> Any:
        description = self._cufile.Descr()
        description.type = self._cufile.FileHandleType.OPAQUE_FD
        description.handle.fd = file.descriptor
        try:
            return self._cufile.handle_register(description.ptr)
        except self._cufile.cuFileError as error:
            raise TransferFailed(
                f"cuFile cannot read {file.path} directly: {error}",
                hint="NVIDIA's gdscheck -p lists file systems that it reads. The backend 'staged' reads all.",
                details={"file": str(file.path)},
            ) from error


class CuFileChannel:
    """See `Channel`, and `DirectWorker` for what its buffers are. A chunk has ended when it has begun.

    Args:
        route: Of all threads.
        cufile: The bindings.
        buffers: The thread's own, in host memory.
    """

    def __init__(self, route: CuFileRoute, cufile: Any, buffers: Sequence[Buffer]) -> None:
        self._route, self._cufile = route, cufile
        self._buffers = {buffer.number: buffer for buffer in buffers}
        self._ended: deque[Buffer] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        begin, offset = self._route.reach(buffer.address)
        done = 0
        while done < chunk.size:
            count, reason = 0, "the file ends there"
            try:
                count = self._cufile.read(self._route.handles[shard_file(chunk.file)], begin, chunk.size - done, chunk.position + done, offset + done)
            except (self._cufile.cuFileError, OSError) as error:
                reason = str(error)
            if count < 0:
                reason = f"it returned {count}"
            if count <= 0:
                raise explained(chunk, self._buffers[buffer.number], "cuFile", reason)
            done += count
        self._ended.append(buffer)

    def end(self) -> Buffer:
        """See `Channel.end`."""
        return self._ended.popleft()

    def close(self) -> None:
        """See `Channel.close`. Every read has come back."""


def opened() -> Any:
    """The bindings, with the driver open and no compatibility mode.

    Raises:
        BackendUnavailable: What is missing.
    """
    refuse_without_kernel_module()
    open_driver()
    return bindings()


def _probe() -> Probe:
    return ask("gms_core.snapshot.backends.cufile_gds", about="the driver of cuFile")


def _tried() -> Probe:
    refuse_without_kernel_module()
    return Probe(True, open_driver())


CUFILE_GDS = StagedBackend(NAME, _probe, CuFileRoute, Pace(), directions=frozenset({"restore"}), worker=DirectWorker)

if __name__ == "__main__":
    answer(_tried)
