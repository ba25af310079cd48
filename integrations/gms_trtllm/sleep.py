"""GMS's memory in TensorRT-LLM's sleep: what takes its tagged memory away and gives it back, in every rank, does so with GMS's mappings too.

TensorRT-LLM itself leaves weights that GMS has placed where they are. All its ways to sleep come down to two functions of
``tensorrt_llm._torch.virtual_memory``, which a rank calls between two steps. Addresses stay, and with them CUDA graphs.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import Protocol

from gms_core.engine_log import log
from gms_core.ranks import all_or_none
from gms_patches.apply import Applied, apply
from gms_patches.for_trtllm import MATERIALISE_MEMORY, RELEASE_MEMORY
from gms_patches.patch import Patch
from gms_trtllm.clients import all_loaded
from gms_trtllm.kv import this_rank
from gms_trtllm.ranks import all_ranks

_HOME = "tensorrt_llm._torch.virtual_memory"
_ELSEWHERE = ("tensorrt_llm.executor.ray.gpu_worker", "tensorrt_llm.executor.ray_gpu_worker", "tensorrt_llm.llmapi.rlhf_utils")
"""Modules that import the two functions by name, as versions have them."""
_WEIGHTS, _DRAFT_WEIGHTS, _KV_CACHE = "model_weights", "draft_model_weights", "kv_cache"
"""What TensorRT-LLM calls the memory of weights, and of KV caches."""

Change = Callable[..., int]


class Sleeps(Protocol):
    """Memory of GMS's that sleeps with the rest."""

    @property
    def is_asleep(self) -> bool:
        """Whether it is not mapped."""

    def suspend(self) -> None:
        """Unmap it. Idempotent."""

    def resume(self) -> None:
        """Map it again. Idempotent."""


_SUSPEND, _RESUME = methodcaller("suspend"), methodcaller("resume")

_in_force: list[Applied] = []


def take_part_in_sleep() -> None:
    """Let shared weights of this process sleep and wake up with the rest. Idempotent.

    Raises:
        EngineUnsupported: The two functions are not as the adapter knows them. Nothing was changed.
    """
    try:
        home = importlib.import_module(_HOME)
    except ModuleNotFoundError:
        home = None
    if not (hasattr(home, "release_with_tag") and hasattr(home, "materialize_with_tag")):
        log().info("this TensorRT-LLM has no %s.release_with_tag: it does not sleep, and shared weights stay mapped", _HOME)
        return
    try:
        for patch, build in ((RELEASE_MEMORY, _releasing), (MATERIALISE_MEMORY, _materialising)):
            _in_force.append(applied := apply(patch, build))
            _rebind(patch, applied.original, applied.replacement)
    except BaseException:
        give_up_part_in_sleep()
        raise


def give_up_part_in_sleep() -> None:
    """Undo it. Idempotent."""
    while _in_force:
        applied = _in_force.pop()
        applied.revert()
        _rebind(applied.patch, applied.replacement, applied.original)


def _rebind(patch: Patch, found: object, wanted: object) -> None:
    """Change the function where a module has it under its own name already."""
    name = patch.target.rpartition(":")[2]
    for module in filter(None, map(sys.modules.get, _ELSEWHERE)):
        if getattr(module, name, None) is found:
            setattr(module, name, wanted)


def _releasing(original: Change) -> Change:
    def release_with_tag(*tags: object) -> int:
        return _change(original, tags, _SUSPEND, _RESUME, of_asleep=False)

    return release_with_tag


def _materialising(original: Change) -> Change:
    def materialize_with_tag(*tags: object) -> int:
        return _change(original, tags, _RESUME, _SUSPEND, of_asleep=True)

    return materialize_with_tag


def _change(original: Change, tags: tuple[object, ...], change: Callable[[Sleeps], None], undo: Callable[[Sleeps], None], *, of_asleep: bool) -> int:
    """Change GMS's memory on every rank, then let TensorRT-LLM change its own; where a rank cannot, GMS's stays as it was on all.

    GMS's comes first: as long as TensorRT-LLM has changed nothing, all ranks can stay as they are.
    """
    if not _named(tags):
        return original(*tags)
    ranks = all_ranks()
    with contextlib.ExitStack() as undone:

        def ours() -> None:
            for memory in _named(tags):
                if memory.is_asleep is of_asleep:
                    undone.callback(undo, memory)  # what is done in part is undone too
                    change(memory)

        all_or_none(ranks, ours)
        count = all_or_none(ranks, lambda: original(*tags))
        undone.pop_all()
    return count


def _words(tags: Iterable[object]) -> set[str]:
    return {str(getattr(tag, "value", tag)) for tag in tags}


def _named(tags: Iterable[object]) -> list[Sleeps]:
    """The memory that these tags name. Weights that are not published yet are being loaded, and no engine sleeps then."""
    named, kv = _words(tags), this_rank()
    found: list[Sleeps] = [client for client in all_loaded() if (_DRAFT_WEIGHTS if client.is_draft else _WEIGHTS) in named]
    return [*found, kv] if kv.is_placed and _KV_CACHE in named else found
