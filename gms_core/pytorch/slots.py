"""Where a tensor hangs in a module: how to read what is in a slot, and how to write it."""

from __future__ import annotations

import collections
import contextlib
import copyreg
from collections.abc import Callable
from typing import Any, Final

import torch

from gms_core.tensor_manifest import Kind, Slot, Step

SlotFilter = Callable[[Slot], bool]
"""Says yes or no to a slot."""


def never(slot: Slot) -> bool:  # noqa: ARG001 - a SlotFilter
    """No, to every slot."""
    return False


def key_step(key: object) -> Step:
    """The step to a dict's value."""
    if type(key) is str or type(key) is int:
        return Step("item", key)
    return Step("key", repr(key))


class _Missing:
    """Marks that nothing is there: None is something that can be."""


MISSING: Final = _Missing()

SEQUENCES = (list, tuple, collections.deque)


def slot_names(kind: type) -> list[str]:
    """Names of all ``__slots__`` of a class and its bases."""
    return [name for name in copyreg._slotnames(kind) if name not in ("__dict__", "__weakref__")]  # type: ignore[attr-defined] # noqa: SLF001 - as copy and torch do


def attributes(holder: object) -> dict[str, Any]:
    """What is in an object's ``__dict__`` and ``__slots__``, without running any code of its class."""
    found: dict[str, Any] = {}
    for name in slot_names(type(holder)):
        try:
            found[name] = object.__getattribute__(holder, name)
        except AttributeError:
            continue
    with contextlib.suppress(AttributeError):
        found.update(object.__getattribute__(holder, "__dict__"))
    return found


def read_step(holder: Any, step: Step) -> Any:
    """What a holder has at a step, or `MISSING`."""
    if step.kind in ("module", "parameter", "buffer"):
        if not isinstance(holder, torch.nn.Module):
            return MISSING
        return _registry(holder, step.kind).get(step.name, MISSING)
    if step.kind == "attribute":
        return attributes(holder).get(str(step.name), MISSING)
    if step.kind == "index":
        inside = isinstance(holder, SEQUENCES) and isinstance(step.name, int) and 0 <= step.name < len(holder)
        return holder[step.name] if inside else MISSING
    if not isinstance(holder, dict):
        return MISSING
    if step.kind == "item":
        return holder.get(step.name, MISSING)
    return next((value for key, value in holder.items() if type(key) not in (str, int) and repr(key) == step.name), MISSING)


def read(module: torch.nn.Module, steps: tuple[Step, ...]) -> Any:
    """What is at the end of some steps, or `MISSING`."""
    value: Any = module
    for step in steps:
        value = read_step(value, step)
        if value is MISSING:
            break
    return value


def write(module: torch.nn.Module, slot: Slot, tensor: torch.Tensor) -> None:
    """Put a tensor into a slot whose holder is there. Tuples are made anew around it."""
    _write(module, slot.steps, tensor, persistent=slot.persistent)


def _write(module: torch.nn.Module, steps: tuple[Step, ...], value: Any, *, persistent: bool = True) -> None:
    step = steps[-1]
    holder = read(module, steps[:-1])
    if step.kind == "parameter":
        _vacate(holder, str(step.name), keep=step.kind)
        _registry(holder, step.kind)[str(step.name)] = value
    elif step.kind == "buffer":
        _vacate(holder, str(step.name), keep=step.kind)
        holder.register_buffer(str(step.name), value, persistent=persistent)
    elif step.kind == "attribute":
        # A frozen dataclass refuses setattr, and so does a module that a parameter has been in.
        object.__setattr__(holder, str(step.name), value)
    elif step.kind == "index" and isinstance(holder, tuple):
        items = [value if index == step.name else item for index, item in enumerate(holder)]
        _write(module, steps[:-1], type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items))
    elif step.kind == "key":
        holder[next(key for key in holder if type(key) not in (str, int) and repr(key) == step.name)] = value
    else:
        holder[step.name] = value


def _vacate(holder: torch.nn.Module, name: str, *, keep: Kind) -> None:
    """Make sure that a name is registered in one place only: a module looks into several, one after the other."""
    vars(holder).pop(name, None)
    for kind in ("parameter", "buffer", "module"):
        if kind != keep:
            _registry(holder, kind).pop(name, None)


def _registry(holder: torch.nn.Module, kind: str) -> dict[Any, Any]:
    registry: dict[Any, Any] = vars(holder)[f"_{kind}s"]
    return registry
