"""The reader's side where nothing is loaded at all: make the changes that loading has made in the writer's module, and install its tensors."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch

from gms_core.errors import ManifestError
from gms_core.pytorch.materialise import materialise
from gms_core.pytorch.memory import Report, TensorArena
from gms_core.pytorch.publish import with_index
from gms_core.pytorch.slots import MISSING, read, read_step
from gms_core.pytorch.state import holders
from gms_core.tensor_manifest import Change, Gone, Items, Plain, Same, Step, Value, Word, changes_of, path

_BUILT_ALIKE = "Both sides have to build the same module, with the same versions and options."
_MADE: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Size": torch.Size,
    "deque": collections.deque,
    "set": set,
    "frozenset": frozenset,
    "dict": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}


def take_over(module: torch.nn.Module, manifest: bytes, arena: TensorArena, *, device: torch.device, opaque: tuple[type, ...] = ()) -> Report:
    """Let a module that was built on ``meta`` become what was published, as if it had been loaded.

    Args:
        module: Built as the writer's was, and not loaded. It is of no use if anything is raised.
        manifest: Published with ``before``; see `gms_core.pytorch.publish`.
        arena: Where the published memory is mapped.
        device: Of the module that was published, and of the arena.
        opaque: Classes whose objects are not searched.

    Raises:
        ManifestError: The manifest is damaged, or does not fit the arena or the module.
        UnpopulatedModule: Tensors would be left without content; names them.
    """
    device = with_index(device)
    changes = changes_of(manifest)
    _make(module, [change for change in changes if not change.of_tensor], device)
    report = materialise(module, manifest, arena, device=device, allow_changes=True)
    _make(module, [change for change in changes if change.of_tensor], device)
    _move(module, device, opaque)
    return report


def _make(module: torch.nn.Module, changes: Sequence[Change], device: torch.device) -> None:
    """Make changes. Whatever they name is looked up before the first one is made."""
    plans = [(_found(module, change.holder), change.step, _made(change.value, module, device)) for change in changes]
    for holder, step, value in plans:
        if step is None:
            _fill(holder, value)
        else:
            _put(holder, step, value)


def _found(module: torch.nn.Module, steps: tuple[Step, ...]) -> Any:
    value = read(module, steps)
    if value is MISSING:
        raise ManifestError(f"what was published changes {path(steps)}, which this module does not have", hint=_BUILT_ALIKE)
    return value


def _made(value: Value, module: torch.nn.Module, device: torch.device) -> Any:
    """A value as an object; `MISSING` for nothing, None where a tensor will come."""
    if isinstance(value, Plain):
        return value.value
    if isinstance(value, Same):
        return _found(module, value.steps)
    if isinstance(value, Items):
        return _MADE[value.kind]([_made(item, module, device) for item in value.items])
    if isinstance(value, Word):
        return _named(value, device)
    return MISSING if isinstance(value, Gone) else None


def _named(word: Word, device: torch.device) -> Any:
    found: Any = None
    if word.kind == "device":
        return device if word.name == device.type else torch.device(word.name)
    if word.kind == "dtype":
        found = vars(torch).get(word.name)
    else:
        module, _, name = word.name.partition(":")
        kind, _, member = name.rpartition(":")
        found = sys.modules.get(module)
        for part in (*kind.split("."), member):
            found = getattr(found, part, None)
    if not isinstance(found, (torch.dtype, Enum)):
        raise ManifestError(f"what was published has {word.name}, which is not known here", hint=_BUILT_ALIKE)
    return found


def _put(holder: Any, step: Step, value: Any) -> None:
    name = str(step.name)
    if step.kind in ("parameter", "buffer", "module"):
        registry = vars(holder)[f"_{step.kind}s"]
        if value is MISSING:
            registry.pop(name, None)
        else:
            registry[name] = value
    elif value is not MISSING:
        object.__setattr__(holder, name, value)  # a frozen dataclass refuses setattr, and a module may register what it is given
    elif read_step(holder, step) is not MISSING:
        object.__delattr__(holder, name)


def _fill(holder: Any, content: Any) -> None:
    if isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        (holder.extend if isinstance(holder, collections.deque) else holder.update)(content)


def _move(module: torch.nn.Module, device: torch.device, opaque: tuple[type, ...]) -> None:
    """Whoever has noted down the device that the module was built on means the one that its tensors are on now."""
    for holder in holders(module, opaque).values():
        for step, value in holder.content.items():
            if step.kind == "attribute" and isinstance(value, torch.device) and value.type == "meta":
                object.__setattr__(holder.value, str(step.name), device)
