"""What GMS hangs into SGLang, by SGLang's own registry of hooks.

The registry logs what goes wrong while it applies a hook, and goes on. So `engage`, which is called before a byte is shared, looks whether each of
them is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from gms_core.errors import EngineUnsupported

_SOURCE = HookSource("gms", "gms")


class Hook(NamedTuple):
    """A function of ours that SGLang calls with one of its own.

    Attributes:
        target: Dotted path of SGLang's function.
        kind: When ours is called, and with what.
        function: Ours.
    """

    target: str
    kind: HookType
    function: Callable[..., Any]


def register_hooks(hooks: Sequence[Hook]) -> None:
    """Register hooks that are not registered yet. SGLang applies them once all plugins are loaded."""
    for hook in hooks:
        if not any(function is hook.function for _, function, _ in HookRegistry._hooks[hook.target]):  # noqa: SLF001 - there is no other way to ask
            HookRegistry.register(hook.target, hook.function, hook.kind, source=_SOURCE)


def engage(hooks: Sequence[Hook]) -> None:
    """Register hooks, apply them now, and see to it that each is in place.

    Raises:
        EngineUnsupported: One is not; SGLang's log says why.
    """
    register_hooks(hooks)
    HookRegistry.apply_hooks()
    missing = [hook.target for hook in hooks if hook.target not in HookRegistry._patched]  # noqa: SLF001 - as above
    if missing:
        raise EngineUnsupported(
            f"SGLang has not taken GMS's hooks on {', '.join(missing)}",
            hint="Look for 'Failed to apply hooks' in its log; `gms patches check` shows what differs in this version.",
        )
