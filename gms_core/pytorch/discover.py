"""Find every tensor that a module holds, and every slot that refers to it.

Registered parameters and buffers come first, under every path that leads to them. Then whatever else is in the modules' attributes: tensors,
modules that are not registered, and these inside lists, tuples, deques, dicts, dataclasses and other plain objects, each of which is searched once.
A tensor's own attributes are searched too.

Not searched: closures, bound methods and ``functools.partial``, sets, classes, configuration objects of pydantic, and objects of PyTorch, of NumPy
and of the standard library. A tensor that only one of those holds is private to the process that made it.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gms_core.pytorch.slots import MISSING, SEQUENCES, SlotFilter, attributes, key_step, never, read_step
from gms_core.tensor_manifest import Slot, Step

Steps = tuple[Step, ...]

INTERNAL = frozenset(vars(torch.nn.Module()))
"""What every module has in its ``__dict__``; registries are read for themselves, and hooks are functions."""
LEAVES = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, set, frozenset, torch.dtype, torch.device, torch.Size}
)
_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.GeneratorType,
    types.FrameType,
    types.CodeType,
    weakref.ref,
    weakref.ProxyType,
    weakref.CallableProxyType,
    BaseException,
)
_CONTAINERS = frozenset({"argparse", "collections", "types"})
"""Of the standard library, those whose objects hold what others put there, such as ``types.SimpleNamespace``."""
_OPAQUE_PACKAGES = frozenset({*sys.stdlib_module_names, "numpy", "pydantic", "pydantic_core", "torch", "triton", "zmq"}) - _CONTAINERS


@dataclass(slots=True)
class Found:
    """One tensor object, and all the slots that refer to it."""

    tensor: torch.Tensor
    slots: list[Slot]

    @property
    def name(self) -> str:
        """The first slot, for messages."""
        return str(self.slots[0])


def discover(module: torch.nn.Module, *, opaque: tuple[type, ...] = (), ignore: SlotFilter = never) -> list[Found]:
    """Find all tensors of a module, in an order that is the same for modules that are built alike.

    Args:
        module: The root.
        opaque: Classes whose objects are not searched.
        ignore: Slots that are left out; a tensor that has no other is left out too.
    """
    walk = _Walk(opaque, ignore)
    walk.registered((), module)
    walk.plain()
    return list(walk.found.values())


class _Walk:
    def __init__(self, opaque: tuple[type, ...], ignore: SlotFilter) -> None:
        self.found: dict[int, Found] = {}
        self._opaque = opaque
        self._ignore = ignore
        self._modules: dict[int, tuple[Steps, torch.nn.Module]] = {}
        self._seen: set[int] = set()
        self._waiting: list[tuple[Steps, Any]] = []

    def registered(self, steps: Steps, module: torch.nn.Module) -> None:
        """Record parameters and buffers of a module and of its registered sub-modules, under every path."""
        waiting: list[tuple[Steps, torch.nn.Module, tuple[int, ...]]] = [(steps, module, ())]
        while waiting:
            steps, module, above = waiting.pop()
            if id(module) in above:
                continue
            self._modules.setdefault(id(module), (steps, module))
            content = vars(module)
            for name, parameter in content["_parameters"].items():
                self._record((*steps, Step("parameter", name)), parameter)
            temporary = content["_non_persistent_buffers_set"]
            for name, buffer in content["_buffers"].items():
                self._record((*steps, Step("buffer", name)), buffer, persistent=name not in temporary)
            children = [(name, child) for name, child in content["_modules"].items() if child is not None]
            waiting.extend(((*steps, Step("module", name)), child, (*above, id(module))) for name, child in reversed(children))

    def plain(self) -> None:
        """Search what the modules hold besides, and what is found there, until there is nothing new."""
        searched: set[int] = set()
        while True:
            self._drain()
            module = next((identity for identity in self._modules if identity not in searched), None)
            if module is None:
                return
            searched.add(module)
            steps, holder = self._modules[module]
            inside = attributes(holder)
            self._push(((*steps, Step("attribute", name)), value) for name, value in inside.items() if name not in INTERNAL)

    def _push(self, children: Iterator[tuple[Steps, Any]]) -> None:
        self._waiting.extend(reversed([child for child in children if type(child[1]) not in LEAVES]))

    def _drain(self) -> None:
        while self._waiting:
            steps, value = self._waiting.pop()
            if isinstance(value, torch.Tensor):
                self._record(steps, value)
            elif isinstance(value, torch.nn.Module):
                if id(value) not in self._modules:
                    self.registered(steps, value)
            elif type(value) not in LEAVES:
                self._open(steps, value)

    def _open(self, steps: Steps, value: Any) -> None:
        # A tuple may have to be made anew around a tensor, so each of its holders counts; a cycle of tuples goes through something else.
        if not isinstance(value, tuple):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
        if is_closed(value, self._opaque):
            return
        if isinstance(value, dict):
            self._push(((*steps, key_step(key)), child) for key, child in value.items())
        elif isinstance(value, SEQUENCES):
            self._push(((*steps, Step("index", index)), child) for index, child in enumerate(value))
        else:
            self._push(((*steps, Step("attribute", name)), child) for name, child in attributes(value).items())

    def _record(self, steps: Steps, tensor: torch.Tensor | None, *, persistent: bool = True) -> None:
        if tensor is None:
            return
        known = self.found.get(id(tensor))
        slot = Slot(steps, persistent)
        if not self._ignore(slot):
            if known is None:
                self.found[id(tensor)] = Found(tensor, [slot])
            else:
                known.slots.append(slot)
        if id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            self._push(((*steps, Step("attribute", name)), value) for name, value in attributes(tensor).items())


def is_closed(value: object, opaque: tuple[type, ...] = ()) -> bool:
    """Whether an object that is neither a tensor nor a module is not searched.

    Args:
        value: The object.
        opaque: Classes whose objects are not.
    """
    if type(value) in LEAVES or isinstance(value, (*_OPAQUE, *opaque)):
        return True
    return not isinstance(value, (dict, *SEQUENCES)) and _is_infrastructure(type(value))


def is_open(value: object, opaque: tuple[type, ...] = ()) -> bool:
    """Whether there may be a step from an object to what it holds: into tensors, modules, sets, and whatever is searched."""
    return isinstance(value, (torch.Tensor, torch.nn.Module, set)) or not is_closed(value, opaque)


def reach(module: torch.nn.Module, steps: Steps, opaque: tuple[type, ...] = ()) -> Any:
    """What is at the end of some steps, or `MISSING`. What is not searched is not passed through either."""
    value: Any = module
    for step in steps:
        value = read_step(value, step) if is_open(value, opaque) else MISSING
        if value is MISSING:
            break
    return value


def _is_infrastructure(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _OPAQUE_PACKAGES or hasattr(kind, "__pydantic_validator__")
