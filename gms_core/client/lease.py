"""A session's right to a published pool: to write a draft, or to read a committed layout."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

from gms_core.client.arena import Arena, Received, Take
from gms_core.client.dial import require
from gms_core.errors import AcquireTimeout, ConnectionLost, ForkedSession, GmsError, OutOfMemory, ProtocolError, SessionClosed, VersionMismatch
from gms_core.layout import Identity, Layout
from gms_core.protocol.generations import FEATURE, AwaitGeneration, BeginMove, EndMove, Newer
from gms_core.protocol.messages import Allocate, Commit, Discard, Export, Message, ReadGranted, Release, Welcome
from gms_core.vmm.driver import Access, Driver

log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=Message)


class Link(Protocol):
    """What a lease asks of its session."""

    @property
    def driver(self) -> Driver:
        """The driver that maps memory into this process."""

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself."""

    def perform(self, request: Discard | Release | EndMove) -> None:
        """Carry out a request that has no result."""

    def ask(self, request: AwaitGeneration | BeginMove, kinds: type[Reply]) -> Reply:
        """Carry out a request that is answered by one message of this kind."""

    def receive_allocations(self, request: Allocate | Export, take: Take) -> None:
        """Carry out a request that is answered by descriptors."""

    def commit(self, request: Commit) -> ReadGranted:
        """Publish the draft."""


class _Lease(abc.ABC):
    """What both kinds share: they end once, and a context manager ends them."""

    def __init__(self, link: Link, pool: str) -> None:
        self.pool = pool
        self._link = link
        self._ended = False

    def _check(self) -> None:
        if self._ended:
            raise SessionClosed(f"this lease on pool {self.pool!r} has ended")

    def release(self) -> None:
        """Give the lease and its memory up. Idempotent; an already lost connection is no error, for it released everything."""
        if self._ended:
            return
        self._let_go()  # memory that cannot be unmapped keeps its lease
        self._ended = True
        try:
            self._link.perform(Release(self.pool))
        except (ConnectionLost, SessionClosed, ForkedSession) as error:
            log.debug("lease on pool %s: %s", self.pool, error)

    @abc.abstractmethod
    def _let_go(self) -> None:
        """Unmap what this lease maps."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class ReadLease(_Lease):
    """The right to read one committed layout, until it is released or the connection ends.

    Attributes:
        pool: The pool's name.
        layout: What is published.
        arena: Where it is mapped; None before `map`.
    """

    def __init__(self, link: Link, pool: str, layout: Layout, arena: Arena | None = None) -> None:
        super().__init__(link, pool)
        self.layout = layout
        self.arena = arena
        self._has_two = False

    def map(self, capacity: int = 0) -> Arena:
        """Map the whole layout read-only: one round trip, whatever the number of tensors. Idempotent.

        Args:
            capacity: Bytes of addresses to reserve at least, for a lease that may `move` to a longer layout.
        """
        self._check()
        if self.arena is None:
            offsets = {allocation.id: allocation.offset for allocation in self.layout.allocations}
            arena = Arena(self._link.driver, max(self.layout.extent, capacity), Access.READ)

            def place(item: Received) -> int:
                if item.id not in offsets:
                    raise ProtocolError(f"the server sent allocation {item.id}, which the layout does not name, or sent it twice")
                return offsets.pop(item.id)

            try:
                arena.adopt(lambda take: self._link.receive_allocations(Export(self.pool), take), place)
                if offsets:
                    raise ProtocolError(f"the server did not send allocations {sorted(offsets)[:5]} of the layout")
            except BaseException:
                arena.close()
                raise
            self.arena = arena
        return self.arena

    def unmap(self) -> None:
        """Unmap the memory; its addresses stay reserved and the lease stays held. Idempotent."""
        self._check()
        if self.arena is not None:
            self.arena.unmap()

    def remap(self) -> None:
        """Map the same memory at the same addresses again. Idempotent."""
        self._check()
        if self.arena is not None:
            self.arena.remap()

    def newer(self) -> Newer | None:
        """The committed generation, if it is a later one than this lease reads. Asks the server, which answers at once.

        Raises:
            VersionMismatch: The server is too old to tell.
        """
        self._check()
        try:
            return self._link.ask(AwaitGeneration(self.pool, self.layout.generation, 0.0), Newer)
        except AcquireTimeout:
            return None

    def move(self, identity: Identity | None = None, *, generation: int = 0, check: Callable[[Layout], None] | None = None) -> bool:
        """Read the committed generation in place of this one, from now on, at the same base address.

        What is mapped is replaced: nobody may be reading the old content any more, and tensors lie where the new layout's manifest says. Memory that
        is unmapped stays so, and `remap` maps the new one. The generation before is freed once its last reader has moved, unless it is pinned.

        Args:
            identity: What the new generation has to be; what this one is if None.
            generation: The one that is meant, as `newer` told it; 0 for whichever is committed.
            check: Called with the new layout before anything is changed; what it raises is raised, and nothing is changed.

        Returns:
            Whether the lease reads another generation now.

        Raises:
            IdentityMismatch: It is something else.
            GenerationConflict: Another one is committed meanwhile, or none.
            ArenaTooSmall: It does not fit into the addresses that are reserved here.
            VersionMismatch: The server is too old.
            GmsError: The lease reads what it did before, which is still mapped; if not, the hint says so. If ``layout`` is the new one, only
                the server could not be told, and keeps the old one until the next call or the lease's end.
        """
        self._check()
        if self._has_two:
            self._keep_one()
        self._has_two = True  # as far as this process knows, until it has the answer
        try:
            layout = self._link.ask(BeginMove(self.pool, identity or self.layout.identity, generation), ReadGranted).layout
        except GmsError:
            self._has_two = False
            raise
        if layout.generation == self.layout.generation:
            self._has_two = False
            return False
        try:
            if check is not None:
                check(layout)
            if self.arena is not None:
                self.arena.replace(layout.allocations, lambda ids, take: self._link.receive_allocations(Export(self.pool, tuple(ids)), take))
            self.layout = layout
        except BaseException as error:
            if self.arena is not None and self.arena.allocations != self.layout.allocations:
                self.layout = layout  # an interrupt came when the arena had it already
            try:
                self._keep_one()
            except GmsError as untold:
                error.add_note(f"the server could not be told: {untold}")
            raise
        self._keep_one()
        return True

    def _keep_one(self) -> None:
        """Of two generations, tell the server that this lease keeps the one of its layout."""
        self._link.perform(EndMove(self.pool, self.layout.generation))
        self._has_two = False

    def _let_go(self) -> None:
        if self.arena is not None:
            self.arena.close()


class WriteLease(_Lease):
    """The right to build the next generation of a pool; no other session has it at the same time.

    Attributes:
        pool: The pool's name.
        generation: The number that the commit will carry, or a later one if a rollback takes it meanwhile.
        arena: Writable memory that grows on demand.
    """

    def __init__(self, link: Link, pool: str, generation: int, *, capacity: int, slab_bytes: int, memory_timeout_s: float) -> None:
        super().__init__(link, pool)
        self.generation = generation
        self._memory_timeout_s = memory_timeout_s
        self._batches = 0
        self.arena = Arena(link.driver, capacity)
        self.arena.grow_from(self._provide, slab_bytes)

    def _provide(self, sizes: Sequence[int], take: Take) -> None:
        self._check()
        self._batches += 1
        self._link.receive_allocations(Allocate(self.pool, tuple(sizes), self._memory_timeout_s, self._batches), take)

    def trim(self) -> None:
        """Give back what the arena does not use: whole slabs, and the end of the last one. Calls that follow may extend it again."""
        self._check()
        dropped = self.arena.drop_unused()
        try:
            replaced = self.arena.trim_last()
        except OutOfMemory as error:
            log.warning("the last slab of pool %s is not trimmed: %s", self.pool, error)
            replaced = None
        if replaced is not None:
            dropped.append(replaced)
        if dropped:
            self._link.perform(Discard(self.pool, tuple(dropped)))

    def commit(self, manifest: bytes, identity: Identity, *, pin: bool = False) -> ReadLease:
        """Publish what the arena holds, and become a reader of it, in one step; the arena is read-only from then on.

        Args:
            manifest: What lies where, for the readers.
            identity: What the bytes are.
            pin: Keep the generation without readers too, until it is unpinned.

        Returns:
            The read lease that this lease has become. It has the same arena at the same addresses.

        Raises:
            DriverError: What is published now cannot be mapped for good in this process: the lease has ended.
            VersionMismatch: The server is too old for pins. If one that is has followed another during the call, whether that one has published is
                unknown, and the arena is read-only.
            GmsError: Nothing was published; the lease and its writable arena are as before, unless the connection was lost.
        """
        self._check()
        if pin:
            require(self._link.welcome, FEATURE)
        self.trim()
        self.arena.set_access(Access.READ)
        try:
            granted = self._link.commit(Commit(self.pool, self.arena.allocations, manifest, identity, pin))
        except (ConnectionLost, ProtocolError, VersionMismatch):  # whether it was published is unknown, and published memory is not written to
            raise
        except GmsError:
            self.arena.set_access(Access.READ_WRITE)
            raise
        self._ended = True
        self.arena.stop_growing()
        layout = granted.layout
        lease = ReadLease(self._link, self.pool, Layout(layout.generation, identity, layout.allocations, manifest, layout.digest), self.arena)
        try:
            if layout.generation < self.generation or layout.allocations != self.arena.allocations:
                raise ProtocolError(f"the server committed generation {layout.generation} with a layout that is not this draft's")
            if granted.sealed:
                self.arena.set_access(Access.READ)  # mapped anew from sealed memory: the kernel forgets that this process could write
        except BaseException:
            lease.release()
            raise
        return lease

    def _let_go(self) -> None:
        self.arena.close()
