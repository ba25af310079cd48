"""Addresses for a retained pool. Beneath them lies nothing, scratch, or the pool's memory; the addresses never change."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gms_core.client.arena import Received, Take, round_up
from gms_core.client.scratch import scratch_layout
from gms_core.errors import InvalidArgument, ProtocolError, SessionClosed
from gms_core.layout import Allocation
from gms_core.vmm.driver import Access, Address, Driver, Handle
from gms_core.vmm.undo import UndoStack

Backing = Literal["none", "scratch", "front", "pool"]
"""What lies beneath the addresses. ``front``: the pool's front, and scratch, if there was any, beneath the rest."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A handle at an offset."""

    offset: int
    size: int
    handle: Handle

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class _Left:
    """What `RetainedArena.unmap` took away.

    Attributes:
        alias_bytes: Of the scratch; 0 if there was none.
        cuts: Of the scratch.
        turn: Of the pool's front.
    """

    backing: Backing = "none"
    alias_bytes: int = 0
    cuts: tuple[int, ...] = ()
    turn: int = 0


class RetainedArena:
    """Addresses that an engine can build on before it may touch the pool's memory.

    Tensors, and CUDA graphs that were captured while scratch lay beneath, stay valid when the pool's memory is mapped instead. It is for one thread
    at a time.

    Args:
        driver: Of the pool's device.
        size: Bytes, rounded up to the driver's granularity.

    Attributes:
        base: The first address.
        size: Bytes of addresses; the pool's allocations have to come to exactly that.
    """

    def __init__(self, driver: Driver, size: int) -> None:
        if size <= 0:
            raise InvalidArgument(f"an arena of {size} bytes has no addresses")
        self.size = round_up(size, driver.granularity)
        self.base: Address = driver.reserve(self.size)
        self._driver = driver
        self._backing: Backing = "none"
        self._left = _Left()
        self._alias_bytes, self._turn = 0, 0
        self._cuts: tuple[int, ...] = ()
        self._mapped: list[_Piece] = []
        self._scratch: list[Handle] = []
        self._pool: list[_Piece] = []
        self._spares: dict[int, _Piece] = {}
        self._closed = False

    @property
    def backing(self) -> Backing:
        """What lies beneath the addresses now."""
        return self._backing

    def map_scratch(self, alias_bytes: int, cuts: Sequence[int] = ()) -> int:
        """Map memory of this process alone, the same again and again, in the place of whatever is there.

        What is written at one address may be read at others. There is no promise about the content.

        Args:
            alias_bytes: Bytes that most of the addresses share, see `gms_core.client.scratch.scratch_layout`.
            cuts: Offsets at which a mapping has to end: the borders of the front, if `map_front` is going to be used.

        Returns:
            Bytes of memory that it takes.

        Raises:
            OutOfMemory: There is no room. As after every error, what lay there before lies there still.
        """
        self._check()
        layout = scratch_layout(self.size, self._driver.granularity, alias_bytes, cuts)
        sizes = {piece.allocation: piece.size for piece in layout}
        with UndoStack() as undo:
            handles: list[Handle] = []
            for number in range(len(sizes)):
                handles.append(self._driver.create(sizes[number]))
                undo.push(self._driver.release, handles[-1])
            self._switch([_Piece(piece.offset, piece.size, handles[piece.allocation]) for piece in layout], "scratch")
            undo.commit()
        self._release_scratch()
        self._scratch = handles
        self._alias_bytes, self._cuts = alias_bytes, tuple(cuts)
        return sum(sizes.values())

    def adopt(self, receive: Callable[[Take], None], allocations: Sequence[Allocation], spares: Sequence[Allocation] = ()) -> None:
        """Take the pool's allocations, without mapping any: that is for the pool's holder alone.

        Args:
            receive: Gets them, and the spares, in any order: `RetainedPool.receive`.
            allocations: In arena order, side by side from offset 0.
            spares: The second front: other allocations for some of the same offsets.

        Raises:
            InvalidArgument: They do not fit the arena, or it has a pool already.
            ProtocolError: What came is not what was named.
        """
        self._check()
        if self._pool:
            raise InvalidArgument("this arena has its pool's memory already")
        _check_fit(self.size, allocations, spares)
        missing = {allocation.id: allocation for allocation in (*allocations, *spares)}
        received: dict[int, _Piece] = {}
        with UndoStack() as undo:

            def take(items: Sequence[Received]) -> None:
                for item in items:
                    wanted = missing.pop(item.id, None)
                    if wanted is None or wanted.size != item.size:
                        raise ProtocolError(f"the server sent allocation {item.id} of {item.size} bytes, which is not one of this pool's")
                    handle = self._driver.import_descriptor(item.descriptor, item.size)
                    undo.push(self._driver.release, handle)
                    received[item.id] = _Piece(wanted.offset, wanted.size, handle)

            receive(take)
            if missing:
                raise ProtocolError(f"the server did not send allocations {sorted(missing)[:5]} of the pool")
            undo.commit()
        self._pool = [received[allocation.id] for allocation in allocations]
        self._spares = {allocation.offset: received[allocation.id] for allocation in spares}

    def map_front(self, turn: int) -> None:
        """Map the pool's front alone, and leave scratch beneath the rest. Idempotent. The caller holds the pool, if not yet whole.

        Args:
            turn: Which front, as the hold said: 0 for the one among the allocations, 1 for the spares.

        Raises:
            InvalidArgument: The pool has no front, all of it is mapped, or the scratch was not cut at the front's borders.
        """
        self._check_pool()
        front = [piece for piece in self._of_turn(turn) if piece.offset in self._spares]
        if not front or self._backing == "pool":
            raise InvalidArgument("the pool has no front" if not front else "the pool's memory is mapped already, and not its front alone")
        rest = [piece for piece in self._mapped if not _overlaps(piece, front)]
        replaced = sum(piece.size for piece in self._mapped) - sum(piece.size for piece in rest)
        if replaced not in (0, sum(piece.size for piece in front)):
            raise InvalidArgument("a mapping of the scratch lies across the border of the front", hint="Name the borders as cuts of map_scratch.")
        self._switch(sorted([*rest, *front], key=lambda piece: piece.offset), "front")
        self._turn = turn

    def map_pool(self, turn: int = 0) -> None:
        """Map the pool's memory in the place of whatever is there. Idempotent. The caller holds the pool, whole.

        Args:
            turn: Which front the holder has, as the hold said.

        Raises:
            InvalidArgument: Nothing was adopted.
            DriverError: It cannot be mapped. What lay there before lies there still.
        """
        self._check_pool()
        self._switch(self._of_turn(turn), "pool")
        self._turn = turn
        self._release_scratch()

    def unmap(self) -> None:
        """Leave bare addresses. The pool's memory and its contents stay; scratch is freed. Idempotent."""
        self._check()
        if self._backing == "none":
            return
        left = _Left(self._backing, self._alias_bytes, self._cuts, self._turn)
        self._switch([], "none")
        self._left = left
        self._release_scratch()

    def remap(self) -> None:
        """Put back what `unmap` took away: the same memory of the pool, and scratch as large as it was. Idempotent.

        Raises:
            OutOfMemory: There is no room for scratch. The call can be repeated.
        """
        self._check()
        if self._backing != "none":
            return
        left = self._left
        try:
            if left.alias_bytes:
                self.map_scratch(left.alias_bytes, left.cuts)
            if left.backing == "front":
                self.map_front(left.turn)
            elif left.backing == "pool":
                self.map_pool(left.turn)
        except BaseException:
            self.unmap()
            self._left = left
            raise

    def disown(self) -> None:
        """Forget the pool's memory, which is unmapped if it is mapped: neither `remap` nor anything else can map it before it is adopted anew.

        It goes before `RetainedPool.release`: whoever holds the pool next must be the only one to have it mapped. Scratch stays. Idempotent.
        """
        self._check()
        if self._backing in ("front", "pool"):
            self.unmap()
        if self._left.backing in ("front", "pool"):
            self._left = _Left()
        self._release_pool()

    def close(self) -> None:
        """Unmap everything and give the addresses back. Tensors that lie here must not be used any more. Idempotent."""
        if self._closed:
            return
        self.unmap()
        self._closed = True
        self._release_pool()
        self._driver.free_reservation(self.base, self.size)

    def _of_turn(self, turn: int) -> list[_Piece]:
        if turn == 0:
            return self._pool
        return [self._spares.get(piece.offset, piece) for piece in self._pool]

    def _switch(self, wanted: Sequence[_Piece], backing: Backing) -> None:
        """Make ``wanted`` all that is mapped; what is mapped already stays untouched."""
        kept = set(self._mapped) & set(wanted)
        leaving = [piece for piece in self._mapped if piece not in kept]
        coming = [piece for piece in wanted if piece not in kept]
        with UndoStack() as undo:
            if leaving:
                self._driver.synchronize()
            for run in _runs(leaving):
                self._driver.unmap(Address(self.base + run[0].offset), run[-1].end - run[0].offset)
                undo.push(self._map, run)
            for run in _runs(coming):
                self._map(run)
                undo.push(self._driver.unmap, Address(self.base + run[0].offset), run[-1].end - run[0].offset)
            undo.commit()
        self._mapped = list(wanted)
        self._backing = backing

    def _map(self, run: Sequence[_Piece]) -> None:
        """Map neighbours, or none of them; one call for their access, since that costs per call far more than per byte."""
        with UndoStack() as undo:
            for piece in run:
                self._driver.map(Address(self.base + piece.offset), piece.size, piece.handle)
                undo.push(self._driver.unmap, Address(self.base + piece.offset), piece.size)
            self._driver.set_access(Address(self.base + run[0].offset), run[-1].end - run[0].offset, Access.READ_WRITE)
            undo.commit()

    def _release_pool(self) -> None:
        pieces, self._pool, self._spares = (*self._pool, *self._spares.values()), [], {}
        for piece in pieces:
            self._driver.release(piece.handle)

    def _release_scratch(self) -> None:
        self._alias_bytes, self._cuts = 0, ()
        while self._scratch:
            self._driver.release(self._scratch.pop())

    def _check(self) -> None:
        if self._closed:
            raise SessionClosed("the arena is closed")

    def _check_pool(self) -> None:
        self._check()
        if not self._pool:
            raise InvalidArgument("no pool's memory was adopted", hint="Call adopt first.")


def _check_fit(size: int, allocations: Sequence[Allocation], spares: Sequence[Allocation]) -> None:
    reached = 0
    for allocation in allocations:
        if allocation.offset != reached:
            raise InvalidArgument(f"allocation {allocation.id} lies at offset {allocation.offset}, and not at {reached}, where the one before ends")
        reached += allocation.size
    if reached != size:
        raise InvalidArgument(f"the pool has {reached} bytes and the arena {size}", hint="Both have to be the same multiple of the granularity.")
    sizes = {allocation.offset: allocation.size for allocation in allocations}
    if wrong := [spare.id for spare in spares if sizes.get(spare.offset) != spare.size]:
        raise InvalidArgument(f"spare {wrong[0]} is not of the offset and size of one of the pool's allocations")


def _overlaps(piece: _Piece, others: Sequence[_Piece]) -> bool:
    """Whether a piece shares bytes with one of others, which are in order."""
    before = bisect.bisect_left(others, piece.end, key=lambda other: other.offset)
    return before > 0 and others[before - 1].end > piece.offset


def _runs(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces in order, split where one does not begin at the end of the one before."""
    runs: list[list[_Piece]] = []
    for piece in pieces:
        if runs and runs[-1][-1].end == piece.offset:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs
