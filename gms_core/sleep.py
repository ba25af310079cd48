"""Sleep and wake-up of an engine that shares its weights: mappings end and come back at the same addresses, and nothing is copied.

The weights belong to the server, which keeps them for the engines that are awake, so a sleeping engine gives up only its mapping of them. KV memory
is the engine's own, unless it fails over, and is given back to the device. What lies elsewhere, such as CUDA graphs and small buffers, stays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from gms_core.client import ReadLease
from gms_core.errors import EngineAsleep, EngineUnsupported
from gms_core.weights.holdings import Holding

WEIGHTS, KV_CACHE = "weights", "kv_cache"
TAGS = (KV_CACHE, WEIGHTS)
"""What engines call the parts that can be unmapped, in the order in which they are."""


class KvMemory(Protocol):
    """KV memory that can be taken away from beneath its addresses."""

    def suspend(self) -> None:
        """Unmap it. Idempotent."""

    def resume(self) -> None:
        """Map memory at the same addresses. Idempotent."""


class Sleeper:
    """What a rank unmaps when its engine sleeps, and what of it is unmapped now.

    Attributes:
        kv: The rank's KV memory, as far as GMS has placed it.
        weights: What holds its weights.
    """

    def __init__(self) -> None:
        self.kv: Sequence[KvMemory] = ()
        self.weights: Sequence[Holding] = ()
        self._asleep: set[str] = set()

    @property
    def asleep(self) -> frozenset[str]:
        """What is unmapped now: ``weights``, ``kv_cache``, both or neither."""
        return frozenset(self._asleep)

    def check_awake(self) -> None:
        """Make sure that a step can be computed: with memory that is not mapped it would be a fault that ends the process.

        Raises:
            EngineAsleep: A part of the memory is not mapped.
        """
        if self._asleep:
            raise EngineAsleep("this engine is asleep: its memory is not mapped", hint="Wake it up first.")

    def suspend(self, tags: Collection[str] = TAGS) -> None:
        """Unmap what is named. Other tags name nothing of GMS. Idempotent.

        Raises:
            EngineUnsupported: The weights are not published yet. Nothing was unmapped.
        """
        leases = self._leases() if WEIGHTS in tags else []
        if KV_CACHE in tags:
            self._asleep.add(KV_CACHE)  # first: what is unmapped in part must not be used either
            for memory in self.kv:
                memory.suspend()
        if WEIGHTS in tags:
            self._asleep.add(WEIGHTS)
            for lease in leases:
                lease.unmap()

    def resume(self, tags: Collection[str] | None = None) -> None:
        """Map weights, KV memory or, without tags, both at their addresses again. Other tags name nothing of GMS. Idempotent.

        Raises:
            OutOfMemory: The device has no room for the KV memory. The call can be repeated.
        """
        for tag in (WEIGHTS, KV_CACHE):
            if tag in self._asleep and (tags is None or tag in tags):
                if tag == WEIGHTS:
                    for lease in self._leases():
                        lease.remap()
                else:
                    for memory in self.kv:
                        memory.resume()
                self._asleep.discard(tag)

    def _leases(self) -> list[ReadLease]:
        leases = [holding.lease for holding in self.weights]
        read = [lease for lease in leases if isinstance(lease, ReadLease)]
        if len(read) < len(leases):
            raise EngineUnsupported("an engine whose weights are not published yet cannot sleep", hint="Wait until it is ready.")
        return read
