"""Memory pools of TensorRT-LLM's own around the loading of weights: they are left for that time, or weights would lie in them.

With a ``sleep_config`` TensorRT-LLM builds its whole model engine in a scope of virtual memory, which is a memory pool of PyTorch's. Before PyTorch
2.10 the outer of two pools may get what is allocated. ``_pool_stack`` of ``tensorrt_llm._torch.virtual_memory`` has the scopes that are open, the
innermost last, each with the context of its pool and the allocator of that; TensorRT-LLM leaves it for a scope inside in the same way, and goes on
with a fresh pool.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from packaging.version import Version

from gms_core.errors import EngineUnsupported

_MODULE = "tensorrt_llm._torch.virtual_memory"
_NESTS = Version("2.10")


def _stack() -> list[Any] | None:
    """The open scopes; None where this TensorRT-LLM does not keep any. A module that was not imported has opened none."""
    return getattr(sys.modules.get(_MODULE), "_pool_stack", None)


def check_sleep(sleep_config: object) -> None:
    """Refuse an engine whose weights would be allocated in a pool that cannot be left.

    Args:
        sleep_config: The engine's option.

    Raises:
        EngineUnsupported: It is set, this TensorRT-LLM does not tell of its pools, and this PyTorch does not nest them.
    """
    if sleep_config is not None and _stack() is None and Version(torch.__version__.partition("+")[0]) < _NESTS:
        raise EngineUnsupported(
            f"with sleep_config TensorRT-LLM would allocate weights in a pool of its own: it keeps no {_MODULE}._pool_stack, "
            f"and PyTorch {torch.__version__} does not nest pools",
            hint="Leave sleep_config out, or use PyTorch 2.10 or later.",
        )


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Leave the innermost pool of TensorRT-LLM's for a while, and go back to it.

    Raises:
        EngineUnsupported: There is one, and it cannot be entered again.
    """
    stack = _stack()
    if not stack:
        yield
        return
    context, allocator = stack[-1]
    try:
        pool = torch.cuda.MemPool(allocator)  # a fresh one, as TensorRT-LLM makes; and before anything is left
    except (AttributeError, RuntimeError, TypeError) as error:
        raise EngineUnsupported(
            f"the pool in {_MODULE}._pool_stack cannot be entered again: {error}", hint="Leave sleep_config out of this engine's options."
        ) from error
    context.__exit__(None, None, None)
    try:
        yield
    finally:
        again = torch.cuda.use_mem_pool(pool)
        again.__enter__()
        stack[-1] = (again, allocator)
