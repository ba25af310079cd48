"""Choosing GMS as the mechanism of vLLM's sleep mode, in the process that the user started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gms_core.errors import EngineUnsupported

BACKEND = "gms"
"""What `GmsSleepBackend` is called in vLLM's registry of mechanisms."""

_STOCK = "cumem"


@contextlib.contextmanager
def stock_sleep_mode_off(arguments: Any) -> Iterator[bool]:
    """While it lasts, vLLM makes a configuration as if sleep mode were off.

    Otherwise it would refuse sleep mode on CPUs, and on GPUs choose an allocator of its own for the weights and for the KV cache
    (vllm/config/model.py, ``enable_cumem_allocator``).

    Args:
        arguments: ``EngineArgs``.

    Yields:
        Whether the user wants sleep mode.

    Raises:
        EngineUnsupported: The user wants another mechanism than GMS.
    """
    wanted = bool(arguments.enable_sleep_mode)
    chosen = getattr(arguments, "sleep_mode_backend", _STOCK)
    if wanted and chosen not in (_STOCK, BACKEND):
        raise EngineUnsupported(
            f"--load-format gms: the sleep mode {chosen!r} would move weights that it does not own", hint="Leave --sleep-mode-backend out."
        )
    arguments.enable_sleep_mode = False
    try:
        yield wanted
    finally:
        arguments.enable_sleep_mode = wanted


def set_sleep_mode(config: Any) -> None:
    """Let an engine sleep by GMS.

    Args:
        config: A ``VllmConfig`` that was made without sleep mode.
    """
    config.model_config.enable_sleep_mode = True
    config.model_config.sleep_mode_backend = BACKEND
