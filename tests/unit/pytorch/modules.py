"""Modules that hold tensors in every way that engines do, built from a description; the same description on ``meta`` gives the reader's twin."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool]


class PackedParameter(nn.Parameter):
    """As vLLM's parameters: a subclass with attributes and a loader."""

    def __new__(cls, data: torch.Tensor, **_: Any) -> Any:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: torch.Tensor, dimension: int) -> None:
        self.dimension = dimension
        self.weight_loader = self.load

    def load(self, content: torch.Tensor) -> None:
        self.data.copy_(content)


class SlottedParameter(nn.Parameter):
    __slots__ = ("note",)


@dataclass(frozen=True)
class Frozen:
    scale: Any
    name: str = "frozen"


class Slotted:
    __slots__ = ("scale", "unset")

    def __init__(self, scale: Any) -> None:
        self.scale = scale


class Pair(NamedTuple):
    first: Any
    second: Any


class Method:
    """As a quantisation method, which refers back to its layer."""

    def __init__(self, layer: nn.Module, scale: Any) -> None:
        self.layer = layer
        self.kernel = {"scales": [scale, 1.0], (1, 2): scale, 3: "three"}


@dataclass(frozen=True)
class Operation:
    """One step of a description. What the numbers mean depends on the kind; all values of all numbers mean something."""

    kind: str
    where: int = 0
    which: int = 0
    shape: tuple[int, ...] = (2, 3)
    dtype: int = 0
    flag: bool = False


KINDS = ["parameter", "packed", "slotted", "buffer", "plain", "list", "tuple", "dict", "frozen", "slots", "named", "method", "deque"]
KINDS += ["child", "share", "tie", "alias", "view", "viewbuffer", "on_tensor", "hidden"]


class Builder:
    """Builds a module, and remembers how to get at each tensor without any searching."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.root = nn.Module()
        self.modules: list[nn.Module] = [self.root]
        self.tensors: list[torch.Tensor] = []
        self.getters: list[Any] = []

    def fresh(self, operation: Operation, *, integers: bool = True) -> torch.Tensor:
        dtype = DTYPES[operation.dtype % len(DTYPES)]
        if not integers and not dtype.is_floating_point:
            dtype = torch.float32
        shape = operation.shape
        if self.device.type == "meta":
            made = torch.empty(shape, dtype=dtype, device="meta")
        else:
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=self.generator)
            made = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
            made = made.clone()
        return made.t() if operation.flag and made.dim() == 2 else made

    def apply(self, operation: Operation, number: int) -> None:
        holder = self.modules[operation.where % len(self.modules)]
        name = f"{operation.kind}{number}"
        kind = operation.kind
        if kind == "child":
            holder.add_module(name, nn.Module())
            self.modules.append(getattr(holder, name))
            return
        if kind == "share":
            # A later module inside an earlier one is no cycle.
            index = operation.where % len(self.modules)
            if index + 1 < len(self.modules):
                later = self.modules[index + 1 :]
                inner = later[operation.which % len(later)]
                if not any(module is holder for module in inner.modules()):
                    holder.add_module(name, inner)
            return
        if kind == "hidden":
            hidden = nn.Module()
            hidden.weight = nn.Parameter(self.fresh(operation, integers=False))
            holder.__dict__[name] = [hidden]
            self.note(lambda: holder.__dict__[name][0].weight)
            return
        if kind in ("tie", "alias", "view", "viewbuffer", "on_tensor"):
            if self.tensors:
                self.again(holder, name, operation)
            return
        self.place(holder, name, operation)

    def again(self, holder: nn.Module, name: str, operation: Operation) -> None:
        getter = self.getters[operation.which % len(self.getters)]
        tensor = getter()
        if operation.kind == "tie" and isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
            self.note(lambda: getattr(holder, name))
        elif operation.kind == "on_tensor":
            tensor.__dict__[name] = self.fresh(operation)
            self.note(lambda: getattr(getter(), name))
        elif operation.kind in ("view", "viewbuffer"):
            view = tensor.detach()
            view = view[1:] if view.dim() and view.shape[0] > 1 else view.view(view.shape)
            if operation.flag and view.dim() == 2:
                view = view.t()
            if operation.kind == "viewbuffer":
                holder.register_buffer(name, view, persistent=operation.flag)
            else:
                setattr(holder, name, view)
            self.note(lambda: getattr(holder, name))
        else:
            setattr(holder, name, {"again": tensor})
            self.note(lambda: getattr(holder, name)["again"])

    def place(self, holder: nn.Module, name: str, operation: Operation) -> None:
        kind = operation.kind
        tensor = self.fresh(operation, integers=kind != "parameter" and kind != "slotted")
        get = {
            "parameter": lambda: getattr(holder, name),
            "packed": lambda: getattr(holder, name),
            "slotted": lambda: getattr(holder, name),
            "buffer": lambda: getattr(holder, name),
            "plain": lambda: getattr(holder, name),
            "list": lambda: getattr(holder, name)[1][0],
            "tuple": lambda: getattr(holder, name)[1][0],
            "dict": lambda: getattr(holder, name)["key"],
            "frozen": lambda: getattr(holder, name).scale,
            "slots": lambda: getattr(holder, name).scale,
            "named": lambda: getattr(holder, name).second,
            "method": lambda: getattr(holder, name).kernel[(1, 2)],
            "deque": lambda: getattr(holder, name)[0],
        }[kind]
        if kind == "parameter":
            holder.register_parameter(name, nn.Parameter(tensor, requires_grad=operation.flag))
        elif kind == "packed":
            holder.register_parameter(name, PackedParameter(tensor, dimension=operation.which))
        elif kind == "slotted":
            parameter = SlottedParameter(tensor)
            parameter.note = f"note {operation.which}"
            holder.register_parameter(name, parameter)
        elif kind == "buffer":
            holder.register_buffer(name, tensor, persistent=operation.flag)
        else:
            made = {
                "plain": lambda: tensor,
                "list": lambda: ["x", [tensor, None]],
                "tuple": lambda: ("x", (tensor, None)),
                "dict": lambda: collections.OrderedDict(other=1, key=tensor),
                "frozen": lambda: Frozen(tensor),
                "slots": lambda: Slotted(tensor),
                "named": lambda: Pair(1, tensor),
                "method": lambda: Method(holder, tensor),
                "deque": lambda: collections.deque([tensor]),
            }[kind]()
            setattr(holder, name, made)
        self.note(get)

    def note(self, getter: Any) -> None:
        self.getters.append(getter)
        self.tensors.append(getter())


def build(operations: list[Operation], device: str, seed: int = 0) -> Builder:
    builder = Builder(device, seed)
    for number, operation in enumerate(operations):
        builder.apply(operation, number)
    return builder


def content(tensor: torch.Tensor) -> bytes:
    """The elements' bytes, in order of indices."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).tolist())


def state(builder: Builder) -> list[tuple[Any, ...]]:
    """What can be seen of each tensor by itself."""
    found = []
    for tensor in (getter() for getter in builder.getters):
        attributes = {key: value for key, value in vars(tensor).items() if not isinstance(value, torch.Tensor) and not callable(value)}
        kind = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, getattr(tensor, "note", None))
        found.append((*kind, attributes, content(tensor)))
    return found


def structure(builder: Builder) -> list[tuple[bool, float]]:
    """Which tensors are the same object, and how far apart they are in the same storage."""
    tensors = [getter() for getter in builder.getters]
    return [(one is other, _distance(one, other)) for one in tensors for other in tensors]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    here, there = one.untyped_storage(), other.untyped_storage()
    if here.nbytes() == 0 or there.nbytes() == 0:
        return math.inf
    inside = here.data_ptr() <= other.data_ptr() < here.data_ptr() + here.nbytes() and here.data_ptr() == there.data_ptr()
    return one.data_ptr() - other.data_ptr() if inside else math.inf
