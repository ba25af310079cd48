"""The server's allocations: physical memory with one kept descriptor each, and back-pressure when the device is full."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gms_core.errors import AllocationTooLarge, GmsError, InvalidArgument, KeeperLost, OutOfMemory, QuotaExceeded
from gms_core.events import Kind
from gms_core.keeper.keeping import Keeping
from gms_core.server.limits import Limits
from gms_core.server.observer import Tell, tell_nobody
from gms_core.vmm.driver import Descriptor, Handle, MemoryInfo, PhysicalDriver
from gms_core.vmm.undo import UndoStack

log = logging.getLogger(__name__)

RETRY_S = 0.05
"""Seconds between looks at a full device: memory that other processes release is announced by nobody."""


@dataclass(frozen=True, slots=True)
class Owned:
    """One allocation: what the driver calls it, the descriptor that clients get, and its bytes."""

    handle: Handle
    descriptor: Descriptor
    size: int


def kept_name(identifier: int, size: int) -> str:
    """What the keeper calls an allocation."""
    return f"memory/{identifier}/{size}"


def of_kept_name(name: str) -> tuple[int, int]:
    """Number and bytes of an allocation from what the keeper calls it."""
    _, identifier, size = name.split("/")
    return int(identifier), int(size)


class Memory:
    """Creates, exports and frees allocations of one device. The driver's calls run in one thread of their own, so that none delays a session."""

    def __init__(self, driver: PhysicalDriver, limits: Limits, keeping: Keeping | None = None) -> None:
        """Begin with nothing.

        Args:
            driver: Of the device; it is closed with this.
            limits: Bounds on what clients may cost.
            keeping: Who keeps the memory beyond this process; None for nobody. It is ended or closed by its owner, after this.
        """
        self.driver = driver
        self.tell: Tell = tell_nobody
        self.waiting = 0
        self.last = 0
        self._keeping = keeping
        self._limits = limits
        self._owned: dict[int, Owned] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gms-driver")
        self._freed = asyncio.Event()

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
        """See that the keeper is there, in the driver's thread."""
        if self._keeping is not None:
            self._thread.submit(self._keeping.check)

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
        """Free and total bytes of the device."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.driver.memory_info)

    async def create(self, sizes: Sequence[int], timeout_s: float, ended: asyncio.Event, pool: str = "") -> list[tuple[int, Owned]]:
        """Create all of these allocations or none, waiting for memory that others release.

        Args:
            sizes: Bytes of each.
            timeout_s: Seconds to wait while the device is full.
            ended: Set when nobody wants them any more: the wait is over then.
            pool: What they are for.

        Raises:
            InvalidArgument: A size is not a positive multiple of the granularity.
            QuotaExceeded: Too many allocations.
            AllocationTooLarge: They can never fit.
            OutOfMemory: There was no room in time, or for as long as anybody wanted it.
        """
        granularity = self.driver.granularity
        if wrong := [size for size in sizes if size <= 0 or size % granularity]:
            raise InvalidArgument(f"sizes {wrong[:5]} are not positive multiples of {granularity} bytes")
        if len(sizes) > self._limits.batch:
            raise QuotaExceeded(f"{len(sizes)} allocations are over the limit of {self._limits.batch} at once", hint="Use larger slabs.")
        wanted, total = sum(sizes), (await self.info()).total
        if wanted > total:
            raise AllocationTooLarge(f"{wanted} bytes can never fit: the device has {total}")
        try:
            return await self._try(sizes)
        except AllocationTooLarge:
            raise
        except OutOfMemory:
            if not timeout_s or ended.is_set():
                raise
        self.tell(Kind.POOL_MEMORY_WAIT_BEGUN, pool, bytes=wanted)
        began, made = time.monotonic(), None
        self.waiting += 1
        try:
            made = await self._retry(sizes, began + timeout_s, ended)
        finally:
            self.waiting -= 1
            outcome = "there is room" if made is not None else "nobody wants them any more" if ended.is_set() else "there was no room in time"
            self.tell(Kind.POOL_MEMORY_WAIT_ENDED, pool, bytes=wanted, seconds=round(time.monotonic() - began, 3), outcome=outcome)
        return made

    async def _try(self, sizes: Sequence[int]) -> list[tuple[int, Owned]]:
        self._freed.clear()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._create_all, sizes)

    async def _retry(self, sizes: Sequence[int], deadline: float, ended: asyncio.Event) -> list[tuple[int, Owned]]:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), RETRY_S)
            try:
                return await self._try(sizes)
            except AllocationTooLarge:
                raise
            except OutOfMemory:
                if time.monotonic() >= deadline or ended.is_set():
                    raise

    def _create_all(self, sizes: Sequence[int]) -> list[tuple[int, Owned]]:
        if len(self._owned) + len(sizes) > self._limits.allocations:
            raise QuotaExceeded(f"{len(sizes)} more allocations are over the limit ({self._limits.allocations} in all)", hint="Use larger slabs.")
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
                self._keeping.keep({kept_name(identifier, owned.size): owned.descriptor for identifier, owned in made})
            self._owned.update(made)
            undo.commit()
        return made

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
        self._thread.submit(self._give_up, owned).add_done_callback(lambda _: loop.call_soon_threadsafe(self._freed.set))

    def _give_up(self, owned: Mapping[int, Owned]) -> None:
        if self._keeping is not None and owned:
            try:
                self._keeping.drop([kept_name(identifier, one.size) for identifier, one in owned.items()])
            except KeeperLost as error:
                log.error("%s", error)  # what it keeps goes with it, or is given up by the next server, which does not know it
        for one in owned.values():
            try:
                os.close(one.descriptor)
                self.driver.release(one.handle)
            except (OSError, GmsError):  # the others can be given up all the same
                log.exception("an allocation of %d bytes could not be given up", one.size)

    def give_up(self) -> None:
        """Close all allocations, but not the driver. What a keeper has lives on. Idempotent."""
        self._thread.shutdown(wait=True)  # what waits there gives memory up: it is not cancelled
        self._keeping = None
        self._give_up(self._owned)
        self._owned.clear()

    def close(self) -> None:
        """Close all allocations, and the driver. Idempotent."""
        self.give_up()
        self.driver.close()
