"""Models as SGLang has built them, before it loads anything into them: what loading changes is found by comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator

from gms_core.pytorch import Remembered
from gms_patches.for_sglang import INITIALIZE_MODEL
from gms_sglang.hooks import Hook

COMMUNICATION = (GroupCoordinator,)
"""What layers hold of SGLang's ranks: buffers and addresses that mean something to one process only."""

_built: ContextVar[list[Remembered] | None] = ContextVar("gms_built", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[list[Remembered]]:
    """While it lasts, models that SGLang builds are added to the list, as they are before they are loaded."""
    found: list[Remembered] = []
    token = _built.set(found)
    try:
        yield found
    finally:
        _built.reset(token)


def _remember(model: torch.nn.Module, *_: Any, **__: Any) -> None:
    found = _built.get()
    if found is not None:
        found.append(Remembered(model, opaque=COMMUNICATION))


HOOKS = (Hook(INITIALIZE_MODEL, "after", _remember),)
