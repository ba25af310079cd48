"""GMS in the place of torch_memory_saver: where SGLang's KV memory lies, and how it is given up and taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from gms_core.engine_log import log
from gms_core.errors import EngineUnsupported
from gms_core.pytorch import placed
from gms_core.pytorch.placed import Place
from gms_core.sleep import KV_CACHE, TAGS
from gms_patches.for_sglang import CREATE_MEMORY_SAVER
from gms_sglang.hooks import Hook
from gms_sglang.place import torch_device
from gms_sglang.rank import this_rank

CUDA_GRAPH = "cuda_graph"
"""SGLang's tag for memory of CUDA graphs, which stays where it is: it is this process's own, and small."""

_place: ContextVar[Place | None] = ContextVar("gms_place", default=None)


@contextlib.contextmanager
def placing(place: Place) -> Iterator[None]:
    """While it lasts, what SGLang allocates for KV memory lies where ``place`` says, and not in memory of this rank's own."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


class GmsMemorySaver(TorchMemorySaverAdapter):  # type: ignore[misc]
    """What SGLang asks to allocate, to give up and to take back memory."""

    @property
    def enabled(self) -> bool:
        """No: SGLang then captures CUDA graphs as without a memory saver, and asks for everything else all the same."""
        return False

    def configure_subprocess(self) -> AbstractContextManager[None]:
        """Nothing has to be loaded before a process starts."""
        return contextlib.nullcontext()

    def region(self, tag: str, enable_cpu_backup: bool = False) -> AbstractContextManager[None]:
        """While it lasts, tensors that are made are of this kind. Weights are placed by the loader.

        Raises:
            EngineUnsupported: A copy in host memory is wanted.
        """
        if enable_cpu_backup:
            raise EngineUnsupported(
                f"--load-format gms: a copy of {tag} in host memory is what GMS makes unnecessary", hint="Leave the option for the backup out."
            )
        if tag != KV_CACHE:
            return contextlib.nullcontext()
        return placed(_place.get() or this_rank().place_private, torch_device(), raw_only=False)

    def cuda_graph(self, **_: Any) -> AbstractContextManager[None]:
        """As without a memory saver."""
        return contextlib.nullcontext()

    def disable(self) -> AbstractContextManager[None]:
        """As without a memory saver."""
        return contextlib.nullcontext()

    def pause(self, tag: str) -> None:
        """Do nothing: SGLang says so before it has forgotten what is in the memory, and `gms_sglang.sleep` unmaps it after that."""
        if tag not in TAGS:
            log().info("memory of the kind %s stays: it is no part of what GMS gives up", tag)

    def resume(self, tag: str) -> None:
        """Do nothing: `gms_sglang.sleep` has mapped it, on all ranks, before SGLang says so."""


def _create(original: Callable[[bool], Any], enable: bool) -> Any:  # noqa: ARG001 - SGLang's signature
    return GmsMemorySaver()


HOOKS = (Hook(CREATE_MEMORY_SAVER, "around", _create),)
