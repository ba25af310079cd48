"""``nixl-ucx``: a peer's published memory, read by NIXL's plugin UCX into host buffers, over RDMA, TCP or what else both machines have."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from gms_core.errors import BackendUnavailable, TransferFailed
from gms_core.snapshot.backends.asking import ask
from gms_core.snapshot.backends.nixl_agents import Agent, NixlError, Range, StillUnderWay
from gms_core.snapshot.backends.nixl_waiting import DEADLINE_S, Patience, Request, hang
from gms_core.snapshot.buffers import Buffer, populate
from gms_core.snapshot.chunks import Channel, Chunk
from gms_core.snapshot.engine import StagedTransfer
from gms_core.snapshot.peers.offers import Offer, Reach, parts
from gms_core.snapshot.peers.peer import REACH, PeerMemories, PeerMemory
from gms_core.snapshot.staged import Pace, StagedBackend, check_pieces, deadline
from gms_core.snapshot.transfer import Direction, Job, Memory, Probe, Transfer
from gms_core.vmm.undo import UndoStack

PLUGIN = "UCX"
SAMPLE_BYTES = 256 * 2**20
"""After so many it is looked at how fast they came."""
_SLOW = 1e9


class PeerRoute:
    """See `Route`.

    Args:
        offer: Of the peer.
        reach: Of the image.
        deadline_s: Seconds in which a read has to end.
        clock: Seconds.
    """

    def __init__(self, offer: Offer, reach: Reach, deadline_s: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._offer, self._reach, self._deadline_s, self._clock = offer, reach, deadline_s, clock
        self._lock = threading.Lock()
        self._began = self._sampled_s = 0.0
        self._arrived = 0

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """See `Route.channel`."""
        populate(buffers)
        return PeerChannel(self._offer, self._reach, buffers, Patience(self._deadline_s), self.arrived)

    def arrived(self, size: int) -> None:
        """Count bytes that have arrived; the first call, with none, is when the first ones were asked for."""
        with self._lock:
            now = self._clock()
            self._began = self._began or now
            self._arrived += size
            if self._arrived >= SAMPLE_BYTES and not self._sampled_s:
                self._sampled_s = now - self._began

    def notes(self) -> list[str]:
        """See `Route.notes`. A GPU's memory that UCX does not reach from the network comes a little at a time, and UCX does not tell."""
        if self._reach.segment == "DRAM" or not self._sampled_s or (rate := SAMPLE_BYTES / self._sampled_s) >= _SLOW:
            return []
        came = f"the first {SAMPLE_BYTES >> 20} MiB of the peer's GPU came at {rate / 1e9:.2f} GB/s: there is no direct way to its memory"
        return [f"{came}. Look at UCX_TLS and UCX_NET_DEVICES; UCX_LOG_LEVEL=info makes UCX say which way it takes"]

    def close(self) -> None:
        """See `Route.close`."""


class PeerChannel:
    """See `Channel`. It has an agent of its own.

    Args:
        offer: Of the peer.
        reach: Of the image.
        buffers: The thread's.
        patience: For what is under way.
        arrived: Is told how many bytes have arrived; none when the first ones are asked for.

    Raises:
        BackendUnavailable: NIXL, or its plugin, cannot be loaded.
        TransferFailed: The peer cannot be reached.
    """

    def __init__(self, offer: Offer, reach: Reach, buffers: Sequence[Buffer], patience: Patience, arrived: Callable[[int], None]) -> None:
        self._reach, self._patience, self._arrived = reach, patience, arrived
        self._begun: deque[tuple[Chunk, PeerMemory, Buffer, Request]] = deque()
        self._agent = Agent(PLUGIN, {})
        with UndoStack() as undo:
            undo.push(self._agent.close)
            try:
                self._agent.register("DRAM", [Range(buffer.address, len(buffer.view), 0) for buffer in buffers])
                self._peer = self._agent.meet(offer.metadata)
            except NixlError as error:
                raise TransferFailed(f"the peer's memory cannot be reached: {error}", hint=REACH) from error
            undo.commit()
        arrived(0)

    def begin(self, chunk: Chunk, buffer: Buffer) -> None:
        """See `Channel.begin`."""
        file, done = chunk.file, 0
        assert isinstance(file, PeerMemory)
        here, there = [], []
        for span in parts(self._reach.spans, chunk.position, chunk.size):
            here.append(Range(buffer.address + done, span.size, 0))
            there.append(Range(span.begin, span.size, self._reach.gpu))
            done += span.size
        try:
            handle = self._agent.begin_from(self._peer, here, self._reach.segment, there)
        except NixlError as error:
            raise file.failed(chunk.position, chunk.size, error) from error
        self._begun.append((chunk, file, buffer, Request(self._agent, handle)))

    def end(self) -> Buffer:
        """See `Channel.end`."""
        chunk, file, buffer, request = self._begun[0]
        try:
            request.end(self._patience)
        except NixlError as error:
            self._begun.popleft()
            raise file.failed(chunk.position, chunk.size, error) from error
        except OSError as error:
            raise file.failed(chunk.position, chunk.size, error.strerror) from error
        self._begun.popleft()
        self._arrived(chunk.size)
        return buffer

    def close(self) -> None:
        """See `Channel.close`."""
        try:
            while self._begun:
                with contextlib.suppress(NixlError):
                    self._begun[0][3].end(self._patience)
                self._begun.popleft()
            self._agent.close()
        except (OSError, StillUnderWay) as error:
            hang(self)
            raise TransferFailed("NIXL does not say whether all reads of the peer's memory have ended") from error


def probe() -> Probe:
    """Whether NIXL's plugin UCX loads here."""
    return ask("gms_core.snapshot.backends.nixl_probe", PLUGIN, about="NIXL's plugin UCX")


class PeerBackend:
    """See `TransferBackend`. It reads one image of one peer.

    Attributes:
        name: What users call it.
        directions: It restores alone.

    Args:
        offer: Of the peer; None if there is none, and then there is nothing to read.
        index: Of the image.
    """

    name = "nixl-ucx"
    directions: frozenset[Direction] = frozenset({"restore"})

    def __init__(self, offer: Offer | None = None, index: int = 0) -> None:
        self._offer, self._index = offer, index

    def probe(self) -> Probe:
        """See `TransferBackend.probe`."""
        return probe()

    def check(self, job: Job) -> None:
        """See `TransferBackend.check`.

        Raises:
            InvalidArgument: The job contradicts itself, or has an option that the backend does not know.
            BackendUnavailable: There is no peer.
        """
        self._served()
        check_pieces(job)
        _TUNED.tuning(job)

    def open(self, job: Job, memory: Memory) -> Transfer:
        """See `TransferBackend.open`.

        Raises:
            InvalidArgument: See `check`.
            BackendUnavailable: There is no peer.
            TransferFailed: The machine has no room for the buffers.
        """
        self.check(job)
        offer = self._served()
        route = PeerRoute(offer, offer.reaches[self._index], deadline(job, DEADLINE_S))
        return StagedTransfer(job, memory, PeerMemories(job.files), route, _TUNED.tuning(job))

    def _served(self) -> Offer:
        if self._offer is None:
            raise BackendUnavailable(
                f"the transfer backend {self.name!r} reads another machine's memory, and no files", hint="gms snapshot pull uses it."
            )
        return self._offer


def _no_files(*_: object) -> PeerRoute:
    raise BackendUnavailable("a peer's memory is no file")


_TUNED = StagedBackend(PeerBackend.name, probe, _no_files, Pace(2, 4), is_deep=True, deadline_s=DEADLINE_S)
NIXL_UCX = PeerBackend()
