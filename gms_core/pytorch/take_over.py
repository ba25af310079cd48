"""The reader's side where nothing is loaded at all: make the changes that loading has made in the writer's module, and install its tensors."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, EnumType
from types import ModuleType
from typing import Any

import torch

from gms_core.errors import ManifestError
from gms_core.pytorch.discover import INTERNAL, is_open, reach
from gms_core.pytorch.holders import as_built, holders
from gms_core.pytorch.materialise import materialise
from gms_core.pytorch.memory import Report, TensorArena, names
from gms_core.pytorch.publish import with_index
from gms_core.pytorch.slots import MISSING, SEQUENCES, read_step, slot_names
from gms_core.tensor_manifest import Change, Gone, Items, Kind, Plain, Same, Step, Value, Word, built_of, changes_of, path

_BUILT_ALIKE = "Both sides have to build the same module, with the same versions and options."
_MADE: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Size": torch.Size,
    "deque": deque,
    "set": set,
    "frozenset": frozenset,
    "dict": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}

_REGISTERED: dict[Kind, type] = {"parameter": torch.nn.Parameter, "buffer": torch.Tensor, "module": torch.nn.Module}


def take_over(module: torch.nn.Module, manifest: bytes, arena: TensorArena, *, device: torch.device, opaque: tuple[type, ...] = ()) -> Report:
    """Let a module that was built on ``meta`` become what was published, as if it had been loaded.

    Args:
        module: Built as the writer's was, and not loaded. It is of no use if anything is raised.
        manifest: Published with ``before``; see `gms_core.pytorch.publish`. The module that was published has to be built of the same classes, with
            tensors of the same dtypes and shapes, as this one is.
        arena: Where the published memory is mapped.
        device: Of the module that was published, and of the arena.
        opaque: Classes whose objects are not searched.

    Raises:
        ManifestError: The manifest is damaged, or does not fit the arena or the module.
        UnpopulatedModule: Tensors would be left without content; names them.
    """
    device = with_index(device)
    changes = changes_of(manifest)
    _check_built(module, built_of(manifest), opaque)
    _make(module, [change for change in changes if not change.of_tensor], device, opaque)
    report = materialise(module, manifest, arena, device=device, opaque=opaque, allow_changes=True)
    _make(module, [change for change in changes if change.of_tensor], device, opaque)
    _move(module, device, opaque)
    return report


def _check_built(module: torch.nn.Module, built: Mapping[str, str], opaque: tuple[type, ...]) -> None:
    """Refuse a module that was built differently: what was published might fit into it, and mean something else there."""
    if not built:
        raise ManifestError("what was published does not tell how its module was built", hint="Publish with before=.")
    here = as_built(holders(module, opaque))
    differing = [
        f"{name or 'the module'} is {built.get(name, 'not there')} and here {here.get(name, 'not there')}"
        for name in dict.fromkeys((*built, *here))
        if built.get(name) != here.get(name)
    ]
    if differing:
        raise ManifestError(f"what was published is of a module that was built differently: {names(differing)}", hint=_BUILT_ALIKE)


def _make(module: torch.nn.Module, changes: Sequence[Change], device: torch.device, opaque: tuple[type, ...]) -> None:
    """Make changes. Whatever they name is looked up before the first one is made."""
    plans = []
    for change in changes:
        holder = _found(module, change.holder, opaque)
        value = _made(change.value, module, device, opaque)
        if not _fits(holder, change.step, value):
            raise ManifestError(
                f"the tensor manifest is damaged: {str(change) or 'the module'} cannot become {type(value).__name__}", hint="Publish again."
            )
        plans.append((holder, change.step, value))
    for holder, step, value in plans:
        if step is None:
            _fill(holder, value)
        else:
            _put(holder, step, value)


def _found(module: torch.nn.Module, steps: tuple[Step, ...], opaque: tuple[type, ...]) -> Any:
    value = reach(module, steps, opaque)
    if value is MISSING or not is_open(value, opaque):
        raise ManifestError(f"what was published changes or uses {path(steps)}, which this module does not have", hint=_BUILT_ALIKE)
    return value


def _made(value: Value, module: torch.nn.Module, device: torch.device, opaque: tuple[type, ...]) -> Any:
    """A value as an object; `MISSING` for nothing, None where a tensor will come."""
    if isinstance(value, Plain):
        return value.value
    if isinstance(value, Same):
        return _found(module, value.steps, opaque)
    if isinstance(value, Items):
        items = [_made(item, module, device, opaque) for item in value.items]
        try:
            return _MADE[value.kind](items)
        except (TypeError, ValueError) as error:
            raise ManifestError(f"the tensor manifest is damaged: a {value.kind} cannot be made: {error}", hint="Publish again.") from error
    if isinstance(value, Word):
        return _named(value, device)
    return MISSING if isinstance(value, Gone) else None


def _named(word: Word, device: torch.device) -> Any:
    if word.kind == "device" and word.name == device.type:
        return device
    if word.kind == "enum":
        found = _member(word.name)
    elif word.kind == "device":
        found = torch.device(word.name) if word.name in ("cpu", "cuda", "meta") else None
    else:
        found = vars(torch).get(word.name)
    if not isinstance(found, (torch.dtype, torch.device, Enum)):
        raise ManifestError(f"what was published has {word.name}, which is not known here", hint=_BUILT_ALIKE)
    return found


def _member(name: str) -> Any:
    """A member of an enumeration by its name, if it is in a module that was imported here. No code of that module is run."""
    module, _, inside = name.partition(":")
    classes, _, member = inside.rpartition(":")
    found: Any = sys.modules.get(module)
    for part in classes.split("."):
        found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
    return found.__members__.get(member) if isinstance(found, EnumType) else None


def _fits(holder: Any, step: Step | None, value: Any) -> bool:
    """Whether a value can be put where a change says."""
    if step is None:
        return isinstance(value, dict) if isinstance(holder, dict) else isinstance(holder, (list, deque, set)) and isinstance(value, Iterable)
    if step.kind == "attribute":
        is_internal = isinstance(holder, torch.nn.Module) and step.name in INTERNAL
        return not is_internal and not str(step.name).startswith("__") and not isinstance(holder, (dict, set, *SEQUENCES))
    wanted = _REGISTERED.get(step.kind)
    return wanted is not None and isinstance(holder, torch.nn.Module) and (value is None or value is MISSING or isinstance(value, wanted))


def _put(holder: Any, step: Step, value: Any) -> None:
    name = str(step.name)
    if step.kind != "attribute":
        registry = vars(holder)[f"_{step.kind}s"]
        if value is MISSING:
            registry.pop(name, None)
        else:
            registry[name] = value
        return
    if value is MISSING and read_step(holder, step) is MISSING:
        return
    try:
        if name in slot_names(type(holder)):
            object.__delattr__(holder, name) if value is MISSING else object.__setattr__(holder, name, value)
        elif value is MISSING:
            del vars(holder)[name]
        else:
            vars(holder)[name] = value  # no property of the class has a say
    except (AttributeError, TypeError) as error:
        raise ManifestError(
            f"what was published sets {name}, which a {type(holder).__name__} cannot have here: {error}", hint=_BUILT_ALIKE
        ) from error


def _fill(holder: Any, content: Any) -> None:
    if isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        (holder.extend if isinstance(holder, deque) else holder.update)(content)


def _move(module: torch.nn.Module, device: torch.device, opaque: tuple[type, ...]) -> None:
    """Whoever has noted down the device that the module was built on means the one that its tensors are on now."""
    for holder in holders(module, opaque).values():
        for step, value in holder.content.items():
            if step.kind == "attribute" and isinstance(value, torch.device) and value.type == "meta":
                object.__setattr__(holder.value, str(step.name), device)
