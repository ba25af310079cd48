"""The name `gpu_memory_service`: what TensorRT-LLM imports from it is found here, unless the library of that name is installed.

The finder is the last one that is asked, so whatever is installed is found before. It knows the modules below its own package alone: a library that
is installed, but lacks one of them, is not mixed with this one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import itertools
import sys
from collections.abc import Sequence
from types import ModuleType

NAME = "gpu_memory_service"

SURFACE = {
    "client.torch.allocator": {
        "evict_gms_client_memory_manager": "gms_trtllm.clients:evict",
        "get_or_create_gms_client_memory_manager": "gms_trtllm.clients:get_or_create",
        "gms_use_mem_pool": "gms_trtllm.clients:use_mem_pool",
    },
    "client.torch.module": {
        "_iter_module_tensors": "gms_trtllm.tensors:module_tensors",
        "materialize_module_from_gms": "gms_trtllm.clients:materialise_module",
    },
    "client.torch.tensor": {"_tensor_from_pointer": "gms_trtllm.tensors:tensor_from_pointer"},
    "common.locks": {"GrantedLockType": "gms_trtllm.locks:GrantedLockType", "RequestedLockType": "gms_trtllm.locks:RequestedLockType"},
    "common.utils": {"get_socket_path": "gms_trtllm.place:default_socket"},
    "integrations.common.patches": {"patch_empty_cache": "gms_trtllm.clients:nothing_to_patch"},
    "integrations.common.utils": {"finalize_gms_write": "gms_trtllm.clients:finalise_write"},
}
"""Module below the name, symbol, and where it is here: what TensorRT-LLM's ``_torch/memory/gpu_memory_backend.py`` imports."""

_MODULES = frozenset(module for path in SURFACE for module in itertools.accumulate([NAME, *path.split(".")], "{}.{}".format))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG002 - Python's signature
        if fullname not in _MODULES or (fullname != NAME and not is_ours()):
            return None
        is_package = any(other.startswith(f"{fullname}.") for other in _MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin="gms_trtllm", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "Backed by GMS; see `gms_trtllm`."
        for name, place in SURFACE.get(module.__name__.removeprefix(f"{NAME}."), {}).items():
            home, _, attribute = place.partition(":")
            setattr(module, name, getattr(importlib.import_module(home), attribute))


_finder = _Finder()


def is_ours() -> bool:
    """Whether the library that was imported under the name is this one."""
    return getattr(getattr(sys.modules.get(NAME), "__spec__", None), "loader", None) is _finder


def offer() -> None:
    """Let the name be found here if it is found nowhere else. Idempotent."""
    if _finder not in sys.meta_path:
        sys.meta_path.append(_finder)


def withdraw() -> None:
    """Let the name be found here no more. Idempotent."""
    if is_ours():
        for name in [name for name in sys.modules if name in _MODULES]:
            del sys.modules[name]
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
