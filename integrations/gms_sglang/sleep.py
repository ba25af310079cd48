"""Sleep and wake-up of a scheduler, as ``/release_memory_occupation`` and ``/resume_memory_occupation`` ask for them. What cannot be is refused.

All ranks take one decision: some of SGLang's steps wait for all of them.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from gms_core.engine_log import log
from gms_core.errors import EngineBusy, InvalidArgument
from gms_core.sleep import TAGS
from gms_patches.for_sglang import EXPORT_STATIC_STATE, IMPORT_STATIC_STATE, RELEASE_OCCUPATION, RESUME_OCCUPATION
from gms_sglang.hooks import Hook
from gms_sglang.memory_saver import CUDA_GRAPH
from gms_sglang.rank import this_rank
from gms_sglang.refusals import written
from gms_sglang.together import Outcome, together

KINDS = (*TAGS, CUDA_GRAPH)
"""Tags that a request can have."""


def _release(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Give up memory, once SGLang has forgotten what is in it and its device has finished. What is given up already is left alone."""
    start = time.perf_counter()
    refusal = _agreed(manager, lambda: _check_release(manager, request.tags))
    if refusal:
        return _answer("ReleaseMemoryOccupationReqOutput", refusal)
    # SGLang clears some of the KV memory to forget it, which must be mapped then.
    request.tags = [tag for tag in KINDS if tag in (request.tags or KINDS) and tag not in this_rank().asleep]
    if not request.tags:
        return _answer("ReleaseMemoryOccupationReqOutput")
    answer = original(manager, request)
    this_rank().suspend(request.tags)
    _say(start)
    return answer


def _resume(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Take memory back, before SGLang uses it. Without tags that is all that was given up. Where a rank cannot, all stay as they are."""
    start = time.perf_counter()
    asleep = this_rank().asleep
    refusal = _agreed(manager, lambda: _take_back(manager, request), lambda: this_rank().suspend(asleep))
    if refusal:
        return _answer("ResumeMemoryOccupationReqOutput", refusal)
    answer = original(manager, request)
    _say(start)
    return answer


def _check_release(manager: Any, tags: Collection[str] | None) -> None:
    _check_tags(tags)
    if not _is_idle(manager):
        raise EngineBusy("the engine has requests, and their KV memory is in use", hint="Let them end, or abort them, and ask again.")


def _take_back(manager: Any, request: Any) -> None:
    _check_tags(request.tags)
    missing = sorted(set(request.tags or ()) - manager.offload_tags)
    if missing or not manager.offload_tags:
        what = f"no memory of the kind {missing[0]}" if missing else "no memory of this engine"
        raise InvalidArgument(f"{what} is released, so none can be resumed", hint="Ask /release_memory_occupation first.")
    request.tags = [tag for tag in KINDS if tag in (request.tags or manager.offload_tags)]
    this_rank().resume(request.tags)


def _check_tags(tags: Collection[str] | None) -> None:
    if unknown := sorted(set(tags or ()) - set(KINDS)):
        raise InvalidArgument(f"there is no memory of the kind {unknown[0]!r}", hint=f"Tags are {', '.join(KINDS)}.")


def _is_idle(manager: Any) -> bool:
    """As SGLang asks: from 0.5.21 on requests may wait while generation is paused."""
    if "ignore_waiting" not in inspect.signature(manager.is_fully_idle).parameters:
        return bool(manager.is_fully_idle())
    return bool(manager.is_fully_idle(ignore_waiting=manager.scheduler is not None and manager.scheduler._engine_paused))  # noqa: SLF001 - as above


def _agreed(manager: Any, step: Callable[[], None], take_back: Callable[[], None] = lambda: None) -> str:
    """Do something on every rank, or on none; returns the first refusal of any of them, as of `gms_sglang.refusals.written`, or nothing."""

    def gather(mine: Outcome) -> list[Outcome]:
        found: list[Any] = [None] * torch.distributed.get_world_size(manager.tp_cpu_group)
        torch.distributed.all_gather_object(found, mine, group=manager.tp_cpu_group)
        return found

    return next((written(one["error"]) for one in together(step, gather, take_back) if "error" in one), "")


def _answer(kind: str, refusal: str = "") -> Any:
    """An answer of ours, which carries a refusal where SGLang's have nothing."""
    import sglang.srt.managers.io_struct as io_struct

    return getattr(io_struct, kind)(rid=refusal or None)


def _say(start: float) -> None:
    asleep = this_rank().asleep
    log().info("%s, in %.1f ms", f"not mapped: {', '.join(sorted(asleep))}" if asleep else "awake", (time.perf_counter() - start) * 1e3)


def _no_copies(original: Callable[..., Any], model: Any) -> Any:  # noqa: ARG001 - SGLang's signature
    """Buffers are published, or private and never unmapped: none has to be copied, and published ones cannot be written back."""
    return {"buffers": []}


def _nothing_to_copy(original: Callable[..., Any], model: Any, static_params: Any) -> None:
    """As above."""


HOOKS = (
    Hook(RELEASE_OCCUPATION, "around", _release),
    Hook(RESUME_OCCUPATION, "around", _resume),
    Hook(EXPORT_STATIC_STATE, "around", _no_copies),
    Hook(IMPORT_STATIC_STATE, "around", _nothing_to_copy),
)
