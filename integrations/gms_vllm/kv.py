"""The KV memory of a rank whose engine fails over: addresses from the start, and beneath them the retained pool's memory once the rank holds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gms_core.client import RetainedArena, RetainedPool
from gms_core.client.arena import round_up
from gms_core.client.session import SLAB_BYTES
from gms_core.errors import InvalidArgument
from gms_core.protocol.messages import Held
from gms_core.vmm.driver import Address, Driver
from gms_vllm.private_kv import clear


def cut(size: int, slab: int) -> list[int]:
    """Cut so many bytes into slabs, of which the last one may be shorter."""
    whole, rest = divmod(size, slab)
    return [slab] * whole + [rest] * (rest > 0)


class TakenOver(NamedTuple):
    """How a rank came to its memory.

    Attributes:
        epoch: Of the pool.
        bytes: Mapped.
        hold_s: Seconds until the pool was granted.
        map_s: Seconds from then until the memory could be used.
    """

    epoch: int
    bytes: int
    hold_s: float
    map_s: float


class RetainedKv:
    """Addresses for the raw buffers of a KV cache, with scratch beneath them until the pool's memory is mapped.

    Every buffer begins at a multiple of the driver's granularity, as PyTorch has it for buffers of this size. Behind the last one lies one granule
    for a mark: it is there once some holder has filled the rest with zeros.

    Args:
        driver: Of the device.
        device: The same, for PyTorch.
        buffers: Bytes of each buffer that is going to be placed. Without any, the granule of the mark is all: to hold it is to be the one engine.
        alias_bytes: Bytes of the scratch.

    Attributes:
        arena: The addresses.
        size: Bytes for the buffers.
        scratch_bytes: Memory that the scratch takes.
    """

    def __init__(self, driver: Driver, device: torch.device, buffers: Sequence[int], alias_bytes: int) -> None:
        self._driver, self._device = driver, device
        self._placed = 0
        self._held: Held | None = None
        self.size = sum(round_up(size, driver.granularity) for size in buffers)
        self.arena = RetainedArena(driver, self.size + driver.granularity)
        try:
            self.scratch_bytes = self.arena.map_scratch(alias_bytes)
            # Warm-up reads it before it writes it, and what a device has in fresh memory may be no number.
            clear(self.arena, device)
        except BaseException:
            self.arena.close()
            raise

    def place(self, size: int) -> int:
        """The address for the next buffer.

        Raises:
            InvalidArgument: There is no room left for it.
        """
        offset, end = self._placed, self._placed + round_up(size, self._driver.granularity)
        if end > self.size:
            raise InvalidArgument(f"a buffer of {size} bytes is one too many for {self.size} bytes of KV memory")
        self._placed = end
        return self.arena.base + offset

    def slabs(self) -> list[int]:
        """Sizes of the allocations that make up the memory; all but the last are alike."""
        return cut(self.arena.size, round_up(SLAB_BYTES[self._driver.name], self._driver.granularity))

    def adopt(self, pool: RetainedPool) -> None:
        """Get the pool's memory, so that it only has to be mapped at the promotion.

        Raises:
            InvalidArgument: Its memory is not of this size, or it has none.
        """
        if pool.planned is None:
            raise InvalidArgument(f"pool {pool.name!r} has no plan yet")
        self.arena.adopt(pool.receive, pool.planned.allocations, pool.planned.spares)

    def take_over(self, pool: RetainedPool, mark: bytes, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> TakenOver:
        """Wait until the pool is granted, and map its memory in the place of the scratch. Nothing may use the addresses meanwhile.

        Memory that is new is made zero, as vLLM does with memory of its own. Otherwise it is left as the last holder left it: with finite numbers, as
        a stock engine finds them in blocks that it gives out again.

        Args:
            pool: Whose memory was adopted.
            mark: What is written behind the memory once it is zero: bytes that it cannot have by chance.
            timeout_s: Seconds to wait at most.
            on_wait: Called with the reason, each time that it changes, while it waits.

        Raises:
            AcquireTimeout: The holder before has not ended in time. The call can be repeated, as after any other error.
            FenceFailed: It cannot be ended.
        """
        start = time.perf_counter()
        self.arena.unmap()  # the scratch: the time for it passes while processes of the last holder are still ending
        if self._held is None:
            self._held = pool.hold(timeout_s, on_wait)
        granted = time.perf_counter()
        self.arena.map_pool(self._held.turn)
        place = Address(self.arena.base + self.size)
        if self._driver.read(place, len(mark)) != mark:
            clear(self.arena, self._device)
            self._driver.write(place, mark)
        return TakenOver(self._held.epoch, self.size, granted - start, time.perf_counter() - granted)
