"""Whether a live engine has what an adapter relies on: looked at in the process that is about to use it, once, and before anything is changed."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_patches.patch import Symbol
from gms_patches.source import find, parameters

_HINT = "Use a version of the engine that this adapter knows, or a newer GMS; `gms patches check` shows all that differs."
_ABSENT = object()


def guard(symbols: Sequence[Symbol]) -> None:
    """Refuse an engine in which a symbol is missing, or takes other parameters.

    Args:
        symbols: Of modules that may be imported. What methods assign to ``self`` is looked for in the module's source.

    Raises:
        EngineUnsupported: Names the first such symbol, what is expected there, and what was found.
    """
    for symbol in symbols:
        found = _live(symbol)
        expected = " or ".join(f"({accepted})" for accepted in symbol.signatures) or "it to be there"
        if found is _ABSENT:
            raise EngineUnsupported(f"{symbol.target}, which is needed for {symbol.feature}: expected {expected}, found nothing", hint=_HINT)
        if not symbol.signatures:
            continue
        function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        taken = f"({parameters(function)})" if callable(function) else f"a {type(function).__name__}"
        if taken not in expected.split(" or "):
            raise EngineUnsupported(f"{symbol.target}, which is needed for {symbol.feature}: expected {expected}, found {taken}", hint=_HINT)


def _live(symbol: Symbol) -> Any:
    module, _, path = symbol.target.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return _ABSENT
    for name in path.split("."):
        inside = inspect.getattr_static(found, name, _ABSENT)
        if inside is _ABSENT and isinstance(found, type):
            inside = _field(found, name)
        if inside is _ABSENT:
            return found if isinstance(found, type) and not symbol.signatures and find(symbol.target, _source) else _ABSENT
        found = inside
    return found


def _field(owner: type, name: str) -> Any:
    """A field of a class that keeps them apart from its attributes, as pydantic does."""
    return getattr(owner, "model_fields", {}).get(name, _ABSENT)


def _source(module: str) -> str | None:
    if module not in sys.modules:
        return None
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return None
