"""KV memory of this process's own, as all of it is where an engine does not fail over. It is given back to the device while the engine sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable

from gms_core.client import RetainedArena
from gms_core.errors import OutOfMemory
from gms_core.vmm.driver import Address, Driver

Clear = Callable[[Address, int], None]
"""Makes so many bytes of fresh memory, from an address on, zero before it returns, where the device has not done so by itself."""

_LOOK_S = 0.02
"""Seconds between two attempts to get memory that other processes are releasing."""


class PrivateKv:
    """Ranges of addresses that KV caches lie at, with memory only while the engine is awake.

    Args:
        driver: Of the device.
        clear: Makes fresh memory of it zero.
        patience_s: Seconds to wait for memory that others are releasing when the engine wakes up.
    """

    def __init__(self, driver: Driver, clear: Clear, patience_s: float) -> None:
        self._driver = driver
        self._clear = clear
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
            self._clear(arena.base, arena.size)
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
                    self._clear(arena.base, arena.size)

    def close(self) -> None:
        """Give memory and addresses back. Tensors that lie here must not be used any more."""
        while self._arenas:
            self._arenas.pop().close()
