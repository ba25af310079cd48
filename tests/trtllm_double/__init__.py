"""A double of the part of TensorRT-LLM that GMS touches: `tensorrt_llm` in this folder, written after a description of its interfaces.

TensorRT-LLM itself cannot be installed without an NVIDIA machine and its vendor's index. The double computes with small real modules on the CPU:
where upstream says ``cuda`` it says `tensorrt_llm._double.DEVICE`. What upstream does wrong, the double does wrong too: tests show what GMS changes.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

WITHOUT_GMS, MERGED_FIRST, STAGED_HOOKS = "without_gms", "merged_first", "staged_hooks"
VARIANTS = (WITHOUT_GMS, MERGED_FIRST, STAGED_HOOKS)
"""Before upstream knew GMS; as it was merged first (#13926); with hooks in stages, and a reader that uses them (#14770 on)."""
NATIVE = (MERGED_FIRST, STAGED_HOOKS)
"""Those that have `LoadFormat.GMS`."""

ROOT = Path(__file__).parent
_NAMES = ("tensorrt_llm", "gms_trtllm", "gpu_memory_service")


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in _NAMES]:
        del sys.modules[name]
    importlib.invalidate_caches()


@contextlib.contextmanager
def upstream(variant: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let ``import tensorrt_llm`` import a variant of the double, here and in processes that are started meanwhile.

    The adapter is imported anew, before and after: it looks at what is installed once.
    """
    finders = list(sys.meta_path)
    _forget()
    monkeypatch.setenv("TRTLLM_DOUBLE", variant)
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        yield
    finally:
        if "gms_trtllm" in sys.modules:
            sys.modules["gms_trtllm"].uninstall()  # patches in force are remembered by their names, whatever they are patches of
        sys.meta_path[:] = finders
        _forget()
