"""Sleep and wake-up of an engine that shares its weights: mappings end and come back at the same addresses, and nothing is copied.

The weights belong to the server, which keeps them for the engines that are awake, so a sleeping engine gives up only its mapping of them. KV memory
is the engine's own, unless it fails over, and is given back to the device. What lies elsewhere, such as CUDA graphs and small buffers, stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol

from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

from gms_core.client import ReadLease
from gms_core.errors import EngineUnsupported, InvalidArgument
from gms_core.weights.holdings import Holding
from gms_vllm.sleep_mode import BACKEND

WEIGHTS, KV_CACHE = "weights", "kv_cache"
_LEVELS = (1, 2)


class KvMemory(Protocol):
    """KV memory that can be taken away from beneath its addresses."""

    def suspend(self) -> None:
        """Unmap it. Idempotent."""

    def resume(self) -> None:
        """Map memory at the same addresses. Idempotent."""


class GmsSleepBackend(SleepModeBackend):  # type: ignore[misc]
    """The mechanism ``gms`` of vLLM's sleep mode.

    Attributes:
        kv: The engine's KV memory, if GMS has placed it.
        weights: What holds the engine's weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kv: KvMemory | None = None
        self.weights: Sequence[Holding] = ()
        self._asleep: set[str] = set()

    @property
    def asleep(self) -> frozenset[str]:
        """What is unmapped now: ``weights``, ``kv_cache``, both or neither."""
        return frozenset(self._asleep)

    def suspend(self, level: int = 1) -> None:
        """Unmap weights and KV memory.

        Level 2 does what level 1 does: the weights are not this process's to discard, and vLLM forgets what it has cached at either.

        Raises:
            InvalidArgument: There is no such level.
            EngineUnsupported: The weights are not published yet.
        """
        if level not in _LEVELS:
            raise InvalidArgument(f"{level} is no level of sleep", hint="Levels are 1 and 2.")
        self._suspend((KV_CACHE, WEIGHTS))

    def discard(self, tags: Collection[str]) -> None:
        """Unmap what is named, and forget what was cached."""
        self._suspend([tag for tag in (KV_CACHE, WEIGHTS) if tag in tags])

    def resume(self, tags: Collection[str] | None = None) -> None:
        """Map weights, KV memory or, without tags, both at their addresses again. Other tags name nothing of GMS.

        Raises:
            OutOfMemory: The device has no room for the KV memory. The call can be repeated.
        """
        self._state = "RESUMING"
        for tag in (WEIGHTS, KV_CACHE):
            if tag in self._asleep and (tags is None or tag in tags):
                if tag == WEIGHTS:
                    for lease in self._leases():
                        lease.remap()
                elif self.kv is not None:
                    self.kv.resume()
                self._asleep.discard(tag)
        self._state = "SUSPENDED" if self._asleep else "RUNNING"

    def _suspend(self, tags: Collection[str]) -> None:
        leases = self._leases() if WEIGHTS in tags else []
        for tag in tags:
            # Noted first: what is unmapped in part must not be used either.
            self._state = "SUSPENDED"
            self._asleep.add(tag)
            if tag == KV_CACHE and self.kv is not None:
                self.kv.suspend()
            if tag == WEIGHTS:
                for lease in leases:
                    lease.unmap()

    def _leases(self) -> list[ReadLease]:
        leases = [holding.lease for holding in self.weights]
        read = [lease for lease in leases if isinstance(lease, ReadLease)]
        if len(read) < len(leases):
            raise EngineUnsupported("an engine whose weights are not published yet cannot sleep", hint="Wait until it is ready.")
        return read

    @classmethod
    def preserves_communicators(cls) -> bool:
        """Communicators' memory is not touched."""
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        """Nothing moves, so compiled kernels stay right."""
        return True

    @classmethod
    def preserves_graphs_with_communicators(cls) -> bool:
        """Nothing moves, so CUDA graphs stay right."""
        return True


def register_backend() -> None:
    """Make the mechanism known to vLLM. Idempotent."""
    with contextlib.suppress(ValueError):  # registered already
        SleepModeBackendFactory.register_backend(BACKEND, __name__, GmsSleepBackend.__name__)
