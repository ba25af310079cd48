"""The server's allocations: physical memory with one kept descriptor each, and back-pressure when the device is full."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from gms_core.errors import AllocationTooLarge, GmsError, InvalidArgument, KeeperLost, OutOfMemory, QuotaExceeded
from gms_core.events import Kind
from gms_core.keeper.keeping import Keeping
from gms_core.protocol.status import MemoryWait
from gms_core.server.limits import Limits
from gms_core.server.memory_queue import MemoryQueue
from gms_core.server.observer import Tell, tell_nobody
from gms_core.vmm.driver import Descriptor, Handle, MemoryInfo, PhysicalDriver
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)

RETRY_S = 0.05
"""Seconds between looks at a full device: memory that other processes release is announced by nobody."""
SETTLE_S = 0.1
"""Seconds for which a question about free memory waits for what the driver is doing."""


@dataclass(frozen=True, slots=True)
class Owned:
    """One allocation: what the driver calls it, the descriptor that clients get, and its bytes."""

    handle: Handle
    descriptor: Descriptor
    size: int


@dataclass
class _Order:
    """A request that waits for memory: what is to be made, until when, and for whom. It is told to wait once it could not be served at once."""

    sizes: tuple[int, ...]
    deadline: float
    ended: asyncio.Event
    pool: str
    on_wait: Callable[[str], None]
    made: asyncio.Future[list[tuple[int, Owned]]]
    told: bool = False

    @property
    def outcome(self) -> str:
        """How a wait that is over has ended, in words."""
        if self.made.done() and not self.made.cancelled() and self.made.exception() is None:
            return "there is room"
        return "nobody wants them any more" if self.ended.is_set() else "there was no room in time"

    def fail(self, error: GmsError) -> None:
        """Refuse it, unless nobody waits for it any more."""
        if not self.made.done():
            self.made.set_exception(error)


def kept_name(identifier: int, size: int) -> str:
    """What the keeper calls an allocation."""
    return f"memory/{identifier}/{size}"


def of_kept_name(name: str) -> tuple[int, int]:
    """Number and bytes of an allocation from what the keeper calls it."""
    _, identifier, size = name.split("/")
    return int(identifier), int(size)


class Memory:
    """Creates, exports and frees allocations of one device. The driver's calls run in a thread of their own, so that none delays a session."""

    def __init__(self, driver: PhysicalDriver, limits: Limits, keeping: Keeping | None = None) -> None:
        """Begin with nothing.

        Args:
            driver: Of the device; it is closed with this.
            limits: Bounds on what clients may cost.
            keeping: Who keeps the memory beyond this process; None for nobody. It is ended or closed by its owner, after this.
        """
        self.driver = driver
        self.tell: Tell = tell_nobody
        self.last = 0
        self._keeping = keeping
        self._limits = limits
        self._owned: dict[int, Owned] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gms-driver")
        self._checking: Future[None] | None = None
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="gms-memory-info")  # a long allocation delays no status
        self._queue = MemoryQueue()
        self._orders: dict[int, _Order] = {}
        self._serving: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def adopt(self, allocations: Mapping[int, tuple[Descriptor, int]], last: int) -> None:
        """Take over what another process has created.

        Args:
            allocations: Descriptor, which becomes this object's, and bytes, by number.
            last: The last number that was ever given out.
        """
        for identifier, (descriptor, size) in allocations.items():
            self._owned[identifier] = Owned(self.driver.adopt(descriptor, size), descriptor, size)
        self.last = max([last, *allocations])

    def check_keeper(self) -> None:
        """See that the keeper is there, in the driver's thread, unless it is still being looked after."""
        if self._keeping is not None and (self._checking is None or self._checking.done()):
            self._checking = self._thread.submit(self._keeping.check)

    def kept(self) -> dict[str, int]:
        """Descriptors of all allocations by the names that the keeper has for them."""
        return {kept_name(identifier, owned.size): owned.descriptor for identifier, owned in list(self._owned.items())}

    def __len__(self) -> int:
        return len(self._owned)

    @property
    def bytes(self) -> int:
        """Bytes of all allocations."""
        return sum(owned.size for owned in list(self._owned.values()))  # a copy: the driver's thread adds to it

    async def info(self) -> MemoryInfo:
        """Free and total bytes of the device. What was given up before counts as free, unless the driver is busy for long."""
        # Not by wait_for, which before Python 3.12 swallows a cancellation in the moment of the answer: a server that ends would wait for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await asyncio.wrap_future(self._thread.submit(int))
        return await self._ask()

    async def _ask(self) -> MemoryInfo:
        return await asyncio.get_running_loop().run_in_executor(self._asking, self.driver.memory_info)

    async def create(
        self, sizes: Sequence[int], timeout_s: float, ended: asyncio.Event, pool: str = "", on_wait: Callable[[str], None] = lambda _: None
    ) -> list[tuple[int, Owned]]:
        """Create all of these allocations or none, waiting for memory that others release.

        Args:
            sizes: Bytes of each.
            timeout_s: Seconds to wait while the device is full.
            ended: Set when nobody wants them any more: the wait is over then.
            pool: What they are for; the beginning and the end of a wait are told of it.
            on_wait: Called with what it waits for, when it does.

        Raises:
            InvalidArgument: A size is not a positive multiple of the granularity.
            QuotaExceeded: Too many allocations.
            AllocationTooLarge: They can never fit.
            OutOfMemory: There was no room in time, or for as long as anybody wanted it, or too many wait already.
        """
        granularity = self.driver.granularity
        if wrong := [size for size in sizes if size <= 0 or size % granularity]:
            raise InvalidArgument(f"sizes {wrong[:5]} are not positive multiples of {granularity} bytes")
        if len(sizes) > self._limits.batch:
            raise QuotaExceeded(f"{len(sizes)} allocations are over the limit of {self._limits.batch} at once", hint="Use larger slabs.")
        self._check_number(len(sizes))
        wanted, total = sum(sizes), (await self._ask()).total
        if wanted > total:
            raise AllocationTooLarge(f"{wanted} bytes can never fit: the device has {total}")
        if len(self._queue) >= self._limits.memory_waiters:
            raise OutOfMemory(f"no room for {wanted} bytes: {len(self._queue)} requests wait for memory already")
        loop = asyncio.get_running_loop()
        began = loop.time()
        ticket = self._queue.join(wanted, began)
        order = _Order(tuple(sizes), began + timeout_s, ended, pool, on_wait, loop.create_future())
        self._orders[ticket] = order
        self._wake.set()
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        gone = asyncio.ensure_future(ended.wait())
        gone.add_done_callback(lambda _: self._wake.set())
        try:
            return await order.made
        finally:
            gone.cancel()
            self._orders.pop(ticket, None)
            self._queue.leave(ticket)
            self._wake.set()
            if order.told:
                self.tell(Kind.POOL_MEMORY_WAIT_ENDED, pool, bytes=wanted, seconds=round(loop.time() - began, 3), outcome=order.outcome)

    async def _serve(self) -> None:
        """Serve those who wait, one at a time, until nobody does."""
        loop = asyncio.get_running_loop()
        try:
            while self._orders:
                self._wake.clear()
                free = (
                    await loop.run_in_executor(self._thread, self.driver.memory_info)
                ).free  # in the thread in which memory is given up: after that
                considered, fits, served = set(self._orders), free, False
                while not served and (ticket := self._queue.next(fits, loop.time())) is not None and (order := self._orders.get(ticket)) is not None:
                    served = await self._fill(ticket, order)
                    fits = sum(order.sizes) - 1  # what could not be made may fit on paper only: that must not keep smaller ones waiting
                if served:
                    continue
                self._refuse_late(considered, free, loop.time())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_S):
                        await self._wake.wait()
        except Exception as error:
            log.exception("memory cannot be made")
            for order in self._orders.values():
                if not order.made.done():
                    order.made.set_exception(error)

    async def _fill(self, ticket: int, order: _Order) -> bool:
        """Make the memory of one; returns whether it was answered."""
        loop = asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(self._thread, self._create_all, order.sizes)
        except OutOfMemory as error:
            if not isinstance(error, AllocationTooLarge):
                return False  # others on the same device were faster
            order.fail(error)
        except GmsError as error:
            order.fail(error)
        else:
            self._queue.served(ticket)
            if order.made.done():  # nobody waits for it any more
                self.free(identifier for identifier, _ in made)
            else:
                order.made.set_result(made)
        self._queue.leave(ticket)
        self._orders.pop(ticket, None)
        return True

    def _refuse_late(self, considered: Collection[int], free: int, now: float) -> None:
        for ticket, order in [(ticket, order) for ticket, order in self._orders.items() if ticket in considered]:
            wanted, before = sum(order.sizes), self._queue.before(ticket)
            reason = f"no room for {wanted} bytes: {free} are free" + (f", and {before} requests came before" if before else "")
            if now >= order.deadline or order.ended.is_set():
                order.fail(OutOfMemory(reason))
                self._queue.leave(ticket)
                del self._orders[ticket]
            elif not order.told:
                order.told = True
                self.tell(Kind.POOL_MEMORY_WAIT_BEGUN, order.pool, bytes=wanted)
                order.on_wait(reason)

    def waits(self) -> tuple[MemoryWait, ...]:
        """Those who wait for memory, in order of arrival; one that is being served is not among them."""
        now = asyncio.get_running_loop().time()
        return tuple(
            MemoryWait(one.size, now - one.since, one.passed, one.turn_ends is not None)
            for one in self._queue
            if (order := self._orders.get(one.ticket)) is not None and order.told
        )

    def _create_all(self, sizes: Sequence[int]) -> list[tuple[int, Owned]]:
        self._check_number(len(sizes))
        # A try that must fail takes no memory, not even for a moment: engines on the same device may be allocating too.
        wanted, free = sum(sizes), self.driver.memory_info().free
        if wanted > free:
            raise OutOfMemory(f"no room for {wanted} bytes: {free} are free")
        with UndoStack() as undo:
            made = []
            for size in sizes:
                handle = self.driver.create(size)
                undo.push(self.driver.release, handle)
                descriptor = self.driver.export(handle)
                undo.push(os.close, descriptor)
                self.last += 1
                made.append((self.last, Owned(handle, descriptor, size)))
            if self._keeping is not None:
                kept = {kept_name(identifier, owned.size): owned.descriptor for identifier, owned in made}
                undo.push(self._keeping.forget, list(kept))  # it may take some and have no room for the rest
                self._keeping.keep(kept)
            self._owned.update(made)
            undo.commit()
        return made

    def _check_number(self, more: int) -> None:
        if len(self._owned) + more > self._limits.allocations:
            raise QuotaExceeded(f"{more} more allocations are over the limit ({self._limits.allocations} in all)", hint="Use larger slabs.")

    def descriptors(self, ids: Iterable[int]) -> list[Descriptor]:
        """The kept descriptors of allocations; they stay the server's, the kernel duplicates them on their way."""
        return [self._owned[identifier].descriptor for identifier in ids]

    def seal(self, ids: Iterable[int]) -> bool:
        """Refuse further writable mappings of these allocations, where the kernel can. Returns whether all are sealed."""
        sealed = [self.driver.seal(self._owned[identifier].handle) for identifier in ids]
        return all(sealed)

    def free(self, ids: Iterable[int]) -> None:
        """Give allocations up, in the driver's thread. The memory is free when the last process that maps them has gone."""
        owned = {identifier: self._owned.pop(identifier) for identifier in ids}
        loop = asyncio.get_running_loop()
        self._thread.submit(self._give_up, owned).add_done_callback(lambda _: loop.call_soon_threadsafe(self._wake.set))

    def _give_up(self, owned: Mapping[int, Owned]) -> None:
        if self._keeping is not None and owned:
            try:
                self._keeping.drop([kept_name(identifier, one.size) for identifier, one in owned.items()])
            except KeeperLost as error:
                log.error("%s", error)  # the next check, or the next server, has one that is rid of what nobody knows
        for one in owned.values():
            try:
                os.close(one.descriptor)
                self.driver.release(one.handle)
            except (OSError, GmsError):  # the others can be given up all the same
                log.exception("an allocation of %d bytes could not be given up", one.size)

    def give_up(self) -> None:
        """Close all allocations, but not the driver. What a keeper has lives on. Idempotent."""
        self._asking.shutdown(wait=True)
        self._thread.shutdown(wait=True)  # what waits there gives memory up: it is not cancelled
        self._keeping = None
        self._give_up(self._owned)
        self._owned.clear()

    def close(self) -> None:
        """Close all allocations, and the driver. Idempotent."""
        self.give_up()
        self.driver.close()
