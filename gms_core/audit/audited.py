"""One published generation that is looked at again and again, as an ordinary reader does: with a read lease, and read-only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gms_core.audit.changes import Change, changes
from gms_core.audit.chunks import Block, blocks, chunk_bytes, cut, differing, digest_of_all, digests_of
from gms_core.audit.places import Places, Tensor, tensors_of
from gms_core.client import ReadLease, Session
from gms_core.errors import GmsError, ManifestError, ProtocolError
from gms_core.layout import Identity, Layout
from gms_core.protocol.messages import Status, StatusReport

THREADS = 4
"""Each has one block in its hands, so the memory that a look needs is a few times `chunks.READ_BYTES`."""
LEASE_S = 10.0
"""Seconds to wait for the read lease, at most. What is committed is leased at once."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look has found.

    Attributes:
        changes: What differs from the look before.
        complete: Whether it has seen everything; not if it was stopped or has failed.
        began_s: When it began, in seconds since 1970. What differs was written after the look before began, and before this one ended.
        ended_s: When it ended.
        error: Why the memory could not be read to the end; None if it could, or if the look was stopped.
    """

    changes: tuple[Change, ...]
    complete: bool
    began_s: float
    ended_s: float
    error: GmsError | None = None


class Audited:
    """A leased generation, and the digests of its bytes.

    It keeps the generation for as long as it lasts, as every reader does. A server that is killed and comes back is not noticed.

    Attributes:
        pool: The pool's name.
        device: Of the session.
        layout: The generation that is looked at.
        chunk: Bytes of a chunk, at most: how exactly a difference is found.
        unreadable: Why no tensor can be named; empty if they can.
        looks: Complete looks, without the first one, which finds nothing by itself.
    """

    def __init__(self, session: Session, pool: str, identity: Identity) -> None:
        """Lease the committed generation and map it read-only.

        Args:
            session: With the device's server. It has no other lease on the pool.
            pool: Its name.
            identity: Of what is published.

        Raises:
            IdentityMismatch: Something else is published.
            AcquireTimeout: Nothing is.
            DriverError: It cannot be mapped.
        """
        lease = session.acquire(pool, "ro", identity, timeout_s=LEASE_S)
        if not isinstance(lease, ReadLease):
            lease.release()
            raise ProtocolError("the server gave a write lease to a reader")
        try:
            self._arena = lease.map()
        except BaseException:
            lease.release()
            raise
        self.pool, self.device = pool, session.device
        self.layout: Layout = lease.layout
        self.looks = 0
        self.unreadable = ""
        self._session, self._lease, self._driver = session, lease, session.driver
        self._places = self._find_places()
        self.chunk = chunk_bytes(self.layout.size)
        self._stretches = cut(self.layout.allocations, self._places, self.chunk)
        self._has_digests = False

    def _find_places(self) -> Places:
        try:
            return Places(tensors_of(self.layout.manifest))
        except ManifestError as error:
            self.unreadable = error.message
            return Places(())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the manifest names, in the order of their offsets."""
        return self._places.tensors

    @property
    def content(self) -> str:
        """A digest of all bytes as the last look has seen them. Two audits of one generation have the same one if nothing was written between."""
        return digest_of_all(self._stretches)

    def look(self, stopped: Callable[[], bool] = lambda: False) -> Look:
        """Read everything once, in pieces, and tell what differs from the look before. The first one only takes the digests.

        Args:
            stopped: Asked by several threads before each piece: whether to stop.
        """
        began, reading = time.time(), _Reading(blocks(self._stretches), stopped)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="gms-audit") as pool:
            for worker in [pool.submit(self._work, reading) for _ in range(THREADS)]:
                worker.result()
        first = not self._has_digests
        if reading.complete:
            self._has_digests = True
            self.looks += not first
        return Look(tuple(changes(reading.found, self._places)), reading.complete, began, time.time(), reading.error)

    def _work(self, reading: _Reading) -> None:
        try:
            while (block := reading.next()) is not None:
                reading.found.extend(self._examine(block))
        except GmsError as error:
            reading.end(error)  # the other threads need not go on

    def _examine(self, block: Block) -> list[tuple[int, int]]:
        """Take the digests of a block; gives offset and end of what differs."""
        before = block.stretch.known(block.first, block.last)
        after = digests_of(block, self._driver.read(self._arena.address(block.start), block.size))
        block.stretch.keep(block.first, after)
        return differing(block, before, after) if self._has_digests else []

    def committed(self) -> int:
        """The generation of the pool that new readers get now; 0 if there is none. While the server is away it waits for the next one.

        Raises:
            ConnectionLost: The server has gone for good. The memory is still mapped.
            SessionClosed: Another thread has called `interrupt`.
        """
        return next((pool.generation for pool in self._status().pools if pool.name == self.pool), 0)

    def _status(self) -> StatusReport:
        return self._session.ask(Status(brief=True), StatusReport)

    def interrupt(self) -> None:
        """End the session, also while another thread waits for its server. The memory can still be looked at, but nothing keeps the lease."""
        self._session.close()

    def close(self) -> None:
        """Unmap the generation and give the lease up. Idempotent."""
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Reading:
    """The blocks of one look, given to several threads.

    Attributes:
        found: Offset and end of what differs; each thread adds its own.
        complete: Whether all blocks have been given out, and read unless there is an error.
        error: That of the first thread that has failed.
    """

    def __init__(self, left: Iterator[Block], stopped: Callable[[], bool]) -> None:
        self.found: list[tuple[int, int]] = []
        self.complete = False
        self.error: GmsError | None = None
        self._left, self._stopped, self._over = left, stopped, False
        self._lock = threading.Lock()

    def next(self) -> Block | None:
        """The next block; None if there is none, or no more is to be read."""
        with self._lock:
            self._over = self._over or self._stopped()
            block = None if self._over else next(self._left, None)
            if block is None and not self._over:
                self.complete = True
            return block

    def end(self, error: GmsError) -> None:
        """Give out no more."""
        with self._lock:
            self.complete, self._over, self.error = False, True, self.error or error
