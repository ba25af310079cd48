"""``nixl-posix``: NIXL's POSIX plugin in place of plain reads and writes, between files and host buffers.

What is relied on: a request that has ended well has moved all of its bytes; `probe` looks. When NIXL tells of a failure, that is not taken for more
than it is: it may be that of the whole queue, told to a request that is still under way. So the queue is not used again, and is destroyed before any
of its buffers is: the kernel's asynchronous I/O ends all requests then. With the C library's queues (``use_posix_aio``) even an end can be told of
the wrong request; they are not used.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gms_core.errors import BackendUnavailable, TransferFailed
from gms_core.snapshot.backends.asking import ask
from gms_core.snapshot.backends.deep import DeepChannel
from gms_core.snapshot.backends.nixl_agents import Agent, Handle, NixlError, Operation, Range, StillUnderWay
from gms_core.snapshot.backends.nixl_waiting import DEADLINE_S, Patience, hang
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel
from gms_core.snapshot.files import JobFiles, ShardFile
from gms_core.snapshot.staged import Pace, StagedBackend, deadline
from gms_core.snapshot.transfer import Job, Memory, Probe
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)

PLUGIN = "POSIX"
WHOLE_FILE = 2**62
"""Bytes of a file that NIXL may move: as many as it has."""


def posix_agent(requests: int) -> Agent:
    """An agent that moves files.

    Args:
        requests: That it can have under way. NIXL by itself makes room for so many that it takes ten milliseconds.

    Raises:
        BackendUnavailable: NIXL, or its plugin, cannot be loaded, or the kernel gives it no queue.
    """
    room = {"ios_pool_size": str(max(16, requests)), "kernel_queue_size": str(max(16, requests))}
    try:
        return Agent(PLUGIN, {"use_aio": "true", **room}, drains=True)
    except BackendUnavailable:
        return Agent(PLUGIN, {"use_uring": "true", **room})  # it is left to the kernel when it is closed, which does not wait


class _UnderWay(NamedTuple):
    handle: Handle
    size: int


class NixlQueue:
    """See `KernelQueue`. What NIXL could not do is answered as what a plain call may do.

    Args:
        writes: Whether it writes.
        buffers: The thread's.
        patience: For what is under way.
        failed: Is told when NIXL has failed.

    Raises:
        BackendUnavailable: NIXL, or its plugin, cannot be loaded.
    """

    def __init__(self, writes: bool, buffers: Sequence[Buffer], patience: Patience, failed: Callable[[NixlError], None]) -> None:
        self._operation: Operation = "WRITE" if writes else "READ"
        self._patience = patience
        self._failed = failed
        self._files: set[int] = set()
        self._under_way: dict[int, _UnderWay] = {}
        self._ended: list[tuple[int, int]] = []
        self._is_retired = False
        self._agent = posix_agent(len(buffers))
        with UndoStack() as undo:
            undo.push(self.close)
            self._agent.register("DRAM", [Range(buffer.address, len(buffer.view), 0) for buffer in buffers])
            undo.commit()

    def submit(self, buffer: Buffer, size: int, file: ShardFile, position: int) -> None:
        """See `KernelQueue.submit`."""
        if self._is_retired:
            raise OSError(errno.EAGAIN, "NIXL has failed before")
        try:
            descriptor = file.descriptor
            if descriptor not in self._files:
                self._agent.register("FILE", [Range(0, WHOLE_FILE, descriptor)])
                self._files.add(descriptor)
            handle = self._agent.begin(self._operation, "DRAM", Range(buffer.address, size, 0), Range(position, size, descriptor))
        except NixlError as error:
            self._retire(error)
            raise OSError(errno.EAGAIN, str(error)) from error
        if not self._under_way:
            self._patience.renew()
        self._under_way[buffer.number] = _UnderWay(handle, size)

    def reap(self) -> list[tuple[int, int]]:
        """See `KernelQueue.reap`."""
        while not self._ended:
            try:
                if not self._look():
                    self._wait()
            except NixlError as error:
                self._retire(error)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """See `KernelQueue.close`.

        Raises:
            TransferFailed: Something may be under way all the same.
        """
        try:
            self._agent.close()
        except StillUnderWay as error:
            hang(self)
            raise TransferFailed(f"NIXL does not say whether its reads or writes have ended: {error}") from error

    def _look(self) -> bool:
        """Whether something has ended.

        Raises:
            NixlError: NIXL says that a request has failed; it is not looked at again.
        """
        for number, (handle, size) in list(self._under_way.items()):
            try:
                if not self._agent.has_ended(handle):
                    continue
            except NixlError:
                self._take(number, -errno.EAGAIN)
                raise
            self._take(number, size)
        return bool(self._ended)

    def _take(self, number: int, result: int) -> None:
        del self._under_way[number]
        self._ended.append((number, result))
        self._patience.renew()

    def _wait(self) -> None:
        try:
            self._patience.wait()
        except OSError:
            hang(self)
            raise

    def _retire(self, error: NixlError) -> None:
        """Use the queue no more, and come back once the kernel has ended all that is in it: until then, no buffer is anybody else's.

        Raises:
            OSError: That cannot be known.
        """
        self._is_retired = True
        self._failed(error)
        while self._under_way:
            with contextlib.suppress(NixlError):
                self._look()
                if self._under_way:
                    self._wait()
        try:
            self._agent.close()
        except StillUnderWay as still:
            hang(self)
            raise OSError(errno.EBUSY, f"NIXL does not say whether its requests have ended: {error}; {still}") from still


class NixlPosixRoute:
    """See `Route`. What threads share is a count."""

    def __init__(self, job: Job, files: JobFiles, memory: Memory) -> None:  # noqa: ARG002 - as every backend's
        self._direction = job.direction
        self._deadline_s = deadline(job, DEADLINE_S)
        self._lock = threading.Lock()
        self._failures = 0

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return DeepChannel(self._direction, NixlQueue(self._direction == "save", buffers, Patience(self._deadline_s), self._failed))

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        if not self._failures:
            return []
        verb = "written" if self._direction == "save" else "read"
        return [f"NIXL has failed in {self._failures} threads; from there on they have {verb} by plain calls"]

    def close(self) -> None:
        """See `Route.close`."""

    def _failed(self, error: NixlError) -> None:
        log.debug("NIXL: %s", error)
        with self._lock:
            self._failures += 1


def probe() -> Probe:
    """Whether NIXL moves files here, and tells when it could only move a part of one."""
    return ask("gms_core.snapshot.backends.nixl_probe", PLUGIN, about="NIXL's plugin POSIX")


NIXL_POSIX = StagedBackend("nixl-posix", probe, NixlPosixRoute, Pace(4, 4, 4 * 2**20), is_deep=True, deadline_s=DEADLINE_S)
