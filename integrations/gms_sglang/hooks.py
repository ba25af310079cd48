"""What GMS hangs into SGLang, by SGLang's own registry of hooks. It imports SGLang only where a hook is put in place.

The registry logs what goes wrong while it applies a hook, and goes on. So `engage`, which is called before a byte is shared, looks whether each of
them is in place.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from gms_core.errors import EngineUnsupported
from gms_patches.apply import installed_version
from gms_patches.check import is_needed
from gms_patches.for_sglang import DISTRIBUTIONS
from gms_patches.patch import Patch


class Hook(NamedTuple):
    """A function of ours that SGLang calls with one of its own.

    Attributes:
        patch: Which function of SGLang's, and in which versions.
        kind: When ours is called, and with what; see SGLang's ``HookType``.
        function: Ours.
    """

    patch: Patch
    kind: Literal["before", "after", "around"]
    function: Callable[..., Any]

    @property
    def target(self) -> str:
        """SGLang's function as the registry names it."""
        return self.patch.target.replace(":", ".")


def register_hooks(hooks: Sequence[Hook]) -> None:
    """Register hooks that this version needs and that are not registered yet. SGLang applies them once all plugins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    for hook in _needed(hooks):
        if not any(function is hook.function for _, function, _ in HookRegistry._hooks[hook.target]):  # noqa: SLF001 - there is no other way to ask
            HookRegistry.register(hook.target, hook.function, HookType(hook.kind), source=HookSource("gms", "gms"))


def engage(hooks: Sequence[Hook]) -> None:
    """Register hooks, apply them now, and see to it that each is in place.

    Raises:
        EngineUnsupported: One is not; SGLang's log says why.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    register_hooks(hooks)
    HookRegistry.apply_hooks()
    missing = [hook.patch.target for hook in _needed(hooks) if not is_in_place(hook)]
    if missing:
        raise EngineUnsupported(
            f"SGLang has not taken GMS's hooks on {', '.join(missing)}",
            hint="Look for 'Failed to apply hooks' in its log, and for other plugins; `gms patches check` shows what differs in this version.",
        )


def is_in_place(hook: Hook) -> bool:
    """Whether SGLang calls our function when its own is called."""
    try:
        found = pkgutil.resolve_name(hook.target)
    except (AttributeError, ImportError):
        return False
    function = getattr(found, "__func__", found)  # of a class method
    return any(layer is hook.function or hook.function in _enclosed(layer) for layer in _layers(function))


def _needed(hooks: Sequence[Hook]) -> list[Hook]:
    version = installed_version(DISTRIBUTIONS)
    return [hook for hook in hooks if is_needed(hook.patch, version)]


def _layers(function: Any) -> Iterator[Any]:
    """A function, what it wraps, what that wraps, and so on."""
    seen: list[Any] = []
    while function is not None and function not in seen:
        seen.append(function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _enclosed(function: Any) -> list[Any]:
    """What a function has taken along from where it was made."""
    return list(inspect.getclosurevars(function).nonlocals.values()) if inspect.isfunction(function) else []
