"""Questions to an engine core that dies before it answers: vLLM waits for the answer for ever, where nobody looks after the engine yet.

A server that serves is ended by vLLM's own watchdog. Before that, an API server asks its engine core what it can do, and where its ranks are; if that
has died in between, the process would stay, and be no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gms_core.config import settings
from gms_core.errors import ConfigurationError

LOOK_S = 0.5
"""Seconds between two looks at whether the engine core lives."""


def wrap_call_utility(original: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Have a question of an engine that fails over end with the engine core that it was put to.

    Args:
        original: ``AsyncMPClient._call_utility_async``.
    """

    async def _call_utility_async(self: Any, method: str, *args: Any, engine: Any) -> Any:
        if not _fails_over():
            return await original(self, method, *args, engine=engine)
        asking = asyncio.ensure_future(original(self, method, *args, engine=engine))
        try:
            while not asking.done():
                await asyncio.wait((asking,), timeout=LOOK_S)
                if not asking.done():
                    self.ensure_alive()
            return asking.result()
        finally:
            asking.cancel()

    return _call_utility_async


def _fails_over() -> bool:
    try:
        return bool(settings().cohort)
    except ConfigurationError:  # such an engine was refused, if it was to fail over
        return False
