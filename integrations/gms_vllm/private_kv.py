"""KV memory of an engine that does not fail over: this process's own, and given back to the device while the engine sleeps."""

from __future__ import annotations

import logging
import time

import torch

from gms_core.client import RetainedArena
from gms_core.errors import OutOfMemory
from gms_core.pytorch.tensors import bytes_on, storage_at
from gms_core.vmm.driver import Address, Driver

log = logging.getLogger("vllm.gms")

_LOOK_S = 0.02
"""Seconds between two attempts to get memory that other processes are releasing."""


class PrivateKv:
    """Ranges of addresses that KV caches lie at, with memory only while the engine is awake.

    Args:
        driver: Of the device.
        device: The same, for PyTorch.
        patience_s: Seconds to wait for memory that others are releasing when the engine wakes up.
    """

    def __init__(self, driver: Driver, device: torch.device, patience_s: float) -> None:
        self._driver = driver
        self._device = device
        self._patience_s = patience_s
        self._arenas: list[RetainedArena] = []

    @property
    def size(self) -> int:
        """Bytes that it takes while the engine is awake."""
        return sum(arena.size for arena in self._arenas)

    def place(self, size: int) -> int:
        """The address of new memory that is zero.

        Args:
            size: Bytes.

        Raises:
            OutOfMemory: The device has no room.
        """
        arena = RetainedArena(self._driver, size)
        try:
            # Scratch that is as large as its range is plain memory, which no other address shares.
            arena.map_scratch(arena.size)
            clear(arena, self._device)
        except BaseException:
            arena.close()
            raise
        self._arenas.append(arena)
        return arena.base

    def suspend(self) -> None:
        """Give the memory back to the device. Idempotent."""
        for arena in self._arenas:
            arena.unmap()

    def resume(self) -> None:
        """Get memory again, at the same addresses; it is zero. Idempotent.

        Raises:
            OutOfMemory: The device has no room, and had none for as long as was to be waited.
        """
        deadline = time.monotonic() + self._patience_s
        for arena in self._arenas:
            while arena.backing == "none":
                try:
                    arena.remap()
                except OutOfMemory as error:
                    if not error.retryable or time.monotonic() > deadline:
                        raise
                    time.sleep(_LOOK_S)
                else:
                    clear(arena, self._device)

    def close(self) -> None:
        """Give memory and addresses back. Tensors that lie here must not be used any more."""
        while self._arenas:
            self._arenas.pop().close()


def clear(arena: RetainedArena, device: torch.device, start: int = 0, end: int | None = None) -> None:
    """Make fresh memory zero, where the device does not; on ``host`` it is.

    Args:
        arena: Where it lies.
        device: Of it.
        start: Offset of the first byte, in granules.
        end: Offset of the first byte behind, in granules; None for all.
    """
    if device.type == "cuda":
        size = (arena.size if end is None else end) - start
        bytes_on(storage_at(Address(arena.base + start), size, device)).view(torch.int64).zero_()
        torch.cuda.synchronize(device)
