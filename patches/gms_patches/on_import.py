"""Run something once a module has been imported, without importing it: a plugin must not drag half an engine into every process."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[], None]

_lock = threading.RLock()
_waiting: dict[str, list[Callback]] = {}


def when_imported(module: str, callback: Callback) -> None:
    """Call back after ``module`` was imported, or now if it has been.

    An error of the callback is an error of that import.
    """
    with _lock:
        if module not in sys.modules:
            _waiting.setdefault(module, []).append(callback)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            return
    callback()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing of its own: it lets the others find an awaited module, and wraps the loader."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        with _lock:
            if fullname not in _waiting:
                return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as the original does, then runs what waits for the module."""

    def __init__(self, original: importlib.abc.Loader) -> None:
        self._original = original

    def __getattr__(self, name: str) -> object:
        # Resource readers, `get_source` and the like stay those of the original.
        return getattr(self._original, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        module.__loader__ = self._original
        self._original.exec_module(module)
        with _lock:
            callbacks = _waiting.pop(module.__name__, [])
            if not _waiting and _finder in sys.meta_path:
                sys.meta_path.remove(_finder)
        for callback in callbacks:
            callback()


_finder = _Finder()
