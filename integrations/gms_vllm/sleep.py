"""GMS as a mechanism of vLLM's sleep mode."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

from gms_core.errors import InvalidArgument
from gms_core.sleep import TAGS, Sleeper
from gms_vllm.sleep_mode import BACKEND

_LEVELS = (1, 2)


class GmsSleepBackend(SleepModeBackend):  # type: ignore[misc]
    """The mechanism ``gms`` of vLLM's sleep mode.

    Attributes:
        sleeper: What is unmapped, and mapped again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sleeper = Sleeper()

    def suspend(self, level: int = 1) -> None:
        """Unmap weights and KV memory.

        Level 2 does what level 1 does: the weights are not this process's to discard, and vLLM forgets what it has cached at either.

        Raises:
            InvalidArgument: There is no such level.
            EngineUnsupported: The weights are not published yet.
        """
        if level not in _LEVELS:
            raise InvalidArgument(f"{level} is no level of sleep", hint="Levels are 1 and 2.")
        self.discard(TAGS)

    def discard(self, tags: Collection[str]) -> None:
        """Unmap what is named, and forget what was cached."""
        try:
            self.sleeper.suspend(tags)
        finally:
            self._note()

    def resume(self, tags: Collection[str] | None = None) -> None:
        """Map weights, KV memory or, without tags, both at their addresses again. Other tags name nothing of GMS.

        Raises:
            OutOfMemory: The device has no room for the KV memory. The call can be repeated.
        """
        self._state = "RESUMING"
        self.sleeper.resume(tags)
        self._note()

    def _note(self) -> None:
        self._state = "SUSPENDED" if self.sleeper.asleep else "RUNNING"

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
