"""``nixl-gds`` and ``nixl-posix-direct``: NIXL reads files straight into the device's memory, of a GPU by GPUDirect Storage, or of the host."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gms_core.errors import TransferFailed
from gms_core.snapshot.backends.asking import ask
from gms_core.snapshot.backends.cufile_library import open_driver, refuse_without_kernel_module
from gms_core.snapshot.backends.into_memory import all_places, explained
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError, Range, Segment, StillUnderWay, library
from gms_core.snapshot.backends.nixl_posix import PLUGIN, WHOLE_FILE, posix_agent
from gms_core.snapshot.backends.nixl_posix import probe as probe_posix
from gms_core.snapshot.backends.nixl_waiting import DEADLINE_S, Patience, Request, hang
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.direct import DirectWorker
from gms_core.snapshot.files import JobFiles, shard_file
from gms_core.snapshot.staged import Pace, StagedBackend, deadline
from gms_core.snapshot.transfer import Job, Memory, Place, Probe
from gms_core.vmm.undo import UndoStack


class Way(NamedTuple):
    """How NIXL gets at memory.

    Attributes:
        backend: The name of GMS's backend.
        plugin: NIXL's.
        agent: Makes an agent for so many requests.
        segment: What NIXL calls the memory.
        is_shared: Whether all threads use one agent; else each has its own.
    """

    backend: str
    plugin: str
    agent: Callable[[int], Agent]
    segment: Segment
    is_shared: bool


class Reach:
    """An agent that can read files into the device's memory, once that is there.

    Args:
        way: How.
        places: Asked for all of the memory when the agent is used first.
        requests: That it can have under way.
    """

    def __init__(self, way: Way, places: Callable[[], Sequence[Place]], requests: int) -> None:
        self._way, self._places, self._requests = way, places, requests
        self._lock = threading.Lock()
        self._agent: Agent | None = None
        self._gpu = 0
        self._files: set[int] = set()

    def begin(self, chunk: Chunk, address: int) -> Request:
        """Begin to read a chunk to an address.

        Raises:
            NixlError: It was not begun.
            BackendUnavailable: NIXL cannot be loaded, or the memory is none that it reaches.
        """
        descriptor = shard_file(chunk.file).descriptor
        with self._lock:
            if self._agent is None:
                self._agent = self._opened()
            if descriptor not in self._files:
                self._agent.register("FILE", [Range(0, WHOLE_FILE, descriptor)])
                self._files.add(descriptor)
        memory = Range(address, chunk.size, self._gpu)
        return Request(self._agent, self._agent.begin("READ", self._way.segment, memory, Range(chunk.position, chunk.size, descriptor)))

    def close(self) -> None:
        """Give the agent up. Idempotent.

        Raises:
            TransferFailed: Something may be under way; the agent stays to the end of the process.
        """
        try:
            if self._agent is not None:
                self._agent.close()
        except StillUnderWay as error:
            hang(self)
            raise TransferFailed(f"NIXL's plugin {self._way.plugin} does not say whether its reads have ended: {error}") from error
        self._agent = None

    def _opened(self) -> Agent:
        places = self._places()
        self._gpu = max(places[0].gpu, 0)
        with UndoStack() as undo:
            agent = self._way.agent(self._requests)
            undo.push(agent.close)
            agent.register(self._way.segment, [Range(place.address, place.size, self._gpu) for place in places])
            undo.commit()
        return agent


class NixlDirectRoute:
    """See `Route`.

    Args:
        way: How NIXL gets at the memory.
        job: See `TransferBackend.open`.
        files: The job's.
        memory: See `TransferBackend.open`.
    """

    def __init__(self, way: Way, job: Job, files: JobFiles, memory: Memory) -> None:  # noqa: ARG002 - as every backend's
        self._way = way
        self._deadline_s = deadline(job, DEADLINE_S)
        self._places = functools.partial(all_places, job, memory, of_gpu=way.segment == "VRAM", backend=way.backend)
        self._shared = Reach(way, self._places, _MANY) if way.is_shared else None
        if way.segment == "VRAM":
            # Before NIXL does it: it would let cuFile fall back to copies through host memory, and not tell.
            refuse_without_kernel_module()
            open_driver()

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        library()  # it takes a while, which passes before the memory is there
        reach = self._shared or Reach(self._way, self._places, len(buffers))
        return NixlDirectChannel(f"NIXL's plugin {self._way.plugin}", reach, buffers, Patience(self._deadline_s), is_owner=self._shared is None)

    def notes(self) -> list[str]:
        """See `Route.notes`."""
        return []

    def close(self) -> None:
        """See `Route.close`."""
        if self._shared is not None:
            self._shared.close()


class NixlDirectChannel:
    """See `Channel`, and `DirectWorker` for what its buffers are.

    Args:
        library: What is used, for errors.
        reach: The agent.
        buffers: The thread's own, in host memory.
        patience: For what is under way.
        is_owner: Whether the agent ends with the channel.
    """

    def __init__(self, library: str, reach: Reach, buffers: Sequence[Buffer], patience: Patience, *, is_owner: bool) -> None:
        self._library, self._reach, self._patience, self._is_owner = library, reach, patience, is_owner
        self._buffers = {buffer.number: buffer for buffer in buffers}
        self._begun: deque[tuple[Chunk, Buffer, Request]] = deque()

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        try:
            request = self._reach.begin(chunk, buffer.address)
        except NixlError as error:
            raise explained(chunk, self._buffers[buffer.number], self._library, error) from error
        self._begun.append((chunk, buffer, request))

    def end(self) -> Buffer:
        """See `Channel.end`."""
        chunk, buffer, request = self._begun[0]
        try:
            request.end(self._patience)
        except NixlError as error:
            self._begun.popleft()
            raise explained(chunk, self._buffers[buffer.number], self._library, error) from error
        except OSError as error:
            raise shard_file(chunk.file).failed(chunk.position, error) from error
        self._begun.popleft()
        return buffer

    def close(self) -> None:
        """See `Channel.close`. What does not end is left as it is: the memory must not be given up before this process has ended."""
        try:
            while self._begun:
                with contextlib.suppress(NixlError):
                    self._begun[0][2].end(self._patience)
                self._begun.popleft()
        except OSError as error:
            hang(self)
            raise TransferFailed(f"{self._library} does not say whether {len(self._begun)} reads have ended") from error
        if self._is_owner:
            self._reach.close()


def _gds_agent(requests: int) -> Agent:
    return Agent("GDS_MT", {"thread_count": str(requests)}, shared=True)


_MANY = 16
_POSIX = Way("nixl-posix-direct", PLUGIN, posix_agent, "DRAM", is_shared=False)
_GDS = Way("nixl-gds", "GDS_MT", _gds_agent, "VRAM", is_shared=True)


def _probe_gds() -> Probe:
    return ask("gms_core.snapshot.backends.nixl_probe", _GDS.plugin, about="NIXL's plugin GDS_MT")


NIXL_POSIX_DIRECT = StagedBackend(
    _POSIX.backend,
    probe_posix,
    functools.partial(NixlDirectRoute, _POSIX),
    Pace(4, 4, 4 * 2**20),
    is_deep=True,
    directions=frozenset({"restore"}),
    deadline_s=DEADLINE_S,
    worker=DirectWorker,
)
NIXL_GDS = StagedBackend(
    _GDS.backend,
    _probe_gds,
    functools.partial(NixlDirectRoute, _GDS),
    Pace(8, 4),
    is_deep=True,
    directions=frozenset({"restore"}),
    deadline_s=DEADLINE_S,
    worker=DirectWorker,
)
