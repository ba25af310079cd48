"""What in a module holds something: its modules, containers and other objects, each with its class and what was in it at one moment."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from gms_core.pytorch.discover import INTERNAL, LEAVES, Steps, is_open
from gms_core.pytorch.slots import SEQUENCES, attributes, key_step
from gms_core.tensor_manifest import Step, path

REGISTERED = ("parameter", "buffer", "module")
_INSIDE = Step("attribute", "inside")
"""Stands for all that is in a set."""
_HOOKS = tuple(sorted(name for name, value in vars(torch.nn.Module()).items() if "_hooks" in name and isinstance(value, dict)))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """That a tensor was there, without keeping its memory.

    Attributes:
        identity: Of the object.
        form: Its dtype and shape.
        attributes: What was set on it besides functions, which loaders call and models do not.
        likeness: The same as it was then, though a list may have been changed since.
    """

    identity: int
    form: str
    attributes: Mapping[str, Any]
    likeness: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Holder:
    """A module, a container or another object.

    Attributes:
        kind: Its class, at that moment.
        steps: The path on which it was found first.
        content: What was in it.
        hooks: Which hooks a module had, by the numbers that PyTorch gives them.
    """

    value: Any
    kind: type
    steps: Steps
    content: Mapping[Step, Any]
    hooks: tuple[tuple[object, ...], ...]


def holders(module: torch.nn.Module, opaque: tuple[type, ...] = ()) -> dict[int, Holder]:
    """Everything in a module that holds something, by identity.

    Args:
        module: To be searched as `gms_core.pytorch.discover` does.
        opaque: Classes whose objects are not searched.
    """
    found: dict[int, Holder] = {}
    waiting: list[tuple[Steps, Any]] = [((), module)]
    while waiting:
        steps, value = waiting.pop()
        if id(value) in found:
            continue
        inside = _inside(value)
        content = {step: _kept(child) for step, child in inside.items()}
        found[id(value)] = Holder(value, type(value), steps, content, _hooks(value))
        children = [((*steps, step), child) for step, child in inside.items() if not isinstance(child, torch.Tensor) and is_open(child, opaque)]
        waiting.extend(reversed(children))
    return found


def as_built(found: Mapping[int, Holder]) -> dict[str, str]:
    """What a module is made of, by paths: the classes of its modules and other objects, and the dtypes and shapes of its tensors.

    Left out are plain containers, whose content counts, and what lies under keys that are known by their ``repr``, which may have an address in it.
    """
    told: dict[str, str] = {}
    for holder in found.values():
        if any(step.kind == "key" for step in holder.steps):
            continue
        if not isinstance(holder.value, (dict, set, *SEQUENCES)):
            told[path(holder.steps)] = f"{holder.kind.__module__}.{holder.kind.__qualname__}"
        for step, value in holder.content.items():
            if isinstance(value, KeptTensor) and step.kind != "key":
                told[path((*holder.steps, step))] = value.form
    return told


def form_of(tensor: torch.Tensor) -> str:
    """The dtype and shape of a tensor, for people and for comparison."""
    return "a lazy parameter" if is_lazy(tensor) else f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _inside(value: Any) -> dict[Step, Any]:
    if isinstance(value, torch.nn.Module):
        content = vars(value)
        registered = {Step(kind, name): child for kind in REGISTERED for name, child in content[f"_{kind}s"].items()}  # type: ignore[arg-type]
        return registered | {Step("attribute", name): child for name, child in attributes(value).items() if name not in INTERNAL}
    if isinstance(value, dict):
        return {key_step(key): child for key, child in value.items()}
    if isinstance(value, SEQUENCES):
        return {Step("index", index): child for index, child in enumerate(value)}
    if isinstance(value, set):
        return {_INSIDE: frozenset(value)}
    return {Step("attribute", name): child for name, child in attributes(value).items()}


def _hooks(value: Any) -> tuple[tuple[object, ...], ...]:
    return tuple(tuple(vars(value).get(name, ())) for name in _HOOKS) if isinstance(value, torch.nn.Module) else ()


def _kept(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    found = {name: item for name, item in attributes(value).items() if not isinstance(item, _FUNCTIONS)}
    kept = {name: KeptTensor(id(item), form_of(item), {}, {}) if isinstance(item, torch.Tensor) else item for name, item in found.items()}
    return KeptTensor(id(value), form_of(value), kept, {name: _likeness(item) for name, item in kept.items()})


def _likeness(value: Any) -> Any:
    """A container of a tensor as something that cannot be changed: nobody else looks into it."""
    if isinstance(value, dict):
        return (dict, *(part for item in value.items() for part in item))
    return (type(value), *value) if isinstance(value, (list, set)) else value


def alike(before: Any, now: Any) -> bool:
    """Whether a slot has what it had. What is in a container that can be changed is compared for itself."""
    if before is now or (isinstance(before, (KeptTensor, torch.Tensor)) and isinstance(now, (KeptTensor, torch.Tensor))):
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(alike, before, now))
    if isinstance(before, float):
        return bool(before == now or (before != before and now != now))
    return (type(before) in LEAVES or isinstance(before, enum.Enum)) and bool(before == now)
