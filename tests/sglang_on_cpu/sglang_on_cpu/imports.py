"""What SGLang imports and a machine without a GPU does not have: triton, and the operators of a torchvision that was built for CUDA."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def prepare() -> None:
    """Do what is needed before ``torchvision`` and ``sglang`` are imported, once they are. Python may read the file that calls this twice."""
    if any(isinstance(finder, _Before) for finder in sys.meta_path):
        return
    sys.meta_path[:0] = [_Before("torchvision", _name_operators), _Before("sglang", _stand_in_for_triton)]


class _Before(importlib.abc.MetaPathFinder):
    """Runs something once, just before a module is first imported."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self._module = module
        self._action = action

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name == self._module:
            sys.meta_path.remove(self)
            self._action()


def _name_operators() -> None:
    """Torchvision for CUDA registers an implementation of these where PyTorch is built for CPU alone, and fails for want of a schema."""
    import torch

    if not torch.backends.cuda.is_built():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules[__name__]._library = library  # type: ignore[attr-defined]  # what it has defined lives as long as it does


def _stand_in_for_triton() -> None:
    """SGLang has a stub for platforms that have no triton, and uses it on some of them only."""
    if importlib.util.find_spec("triton") is not None:
        return
    import torch.utils._triton

    torch.utils._triton.has_triton_package()  # PyTorch remembers that there is none, before the stub looks like one
    import torch._inductor.runtime.triton_compat

    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    path = next(path for name in ("_triton_stub.py", "_platform_stubs.py") if (path := root / name).exists())
    stub = _load("_sglang_triton_stub", path)
    if hasattr(stub, "install"):
        stub.install()
        return
    sys.meta_path.insert(0, stub._TritonFinder())
    triton, language, runtime, jit = (stub._make_mock(name) for name in ("triton", "triton.language", "triton.runtime", "triton.runtime.jit"))
    triton.__version__, triton.cdiv, triton.next_power_of_2, triton.Config = "3.0.0", stub._cdiv, stub._next_power_of_2, stub._Config
    language.constexpr = type("constexpr", (), {"__init__": lambda self, value=None: setattr(self, "value", value)})
    jit.JITFunction = type("JITFunction", (), {})
    triton.language, triton.runtime, runtime.jit = language, runtime, jit


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
