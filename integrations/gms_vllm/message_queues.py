"""The queues between an engine's processes, in shared memory that has no name: whatever kills the engine, the kernel frees it.

VLLM removes the names itself when it ends in order, and Python's resource tracker does it after a crash, unless it was killed with the rest.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_patches.apply import apply
from gms_patches.for_vllm import MESSAGE_QUEUE

log = logging.getLogger("vllm.gms")


def patch_message_queues() -> None:
    """Take the name off each queue's memory once all have it mapped. On a vLLM that the patch does not know, names are left behind by a kill."""
    try:
        apply(MESSAGE_QUEUE, _wrap)
    except EngineUnsupported as error:
        log.debug("a killed engine may leave shared memory behind: %s", error)


def _wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def wait_until_ready(self: Any) -> None:
        original(self)
        buffer = getattr(self, "buffer", None)
        if buffer is not None and buffer.is_creator:
            buffer.shared_memory.unlink()
            buffer.is_creator = False  # what vLLM asks before it removes the name

    return wait_until_ready
