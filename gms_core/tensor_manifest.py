"""The tensor manifest: what lies where in an arena, and which slots of a module refer to it. Pure data, which needs no PyTorch.

It is per storage: each storage is described once, with its tensors, and each tensor once, with its slots. So ties, views and aliases come back as
they were, and no name is special.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from gms_core.errors import ManifestError

FORMAT = "gms-tensors/1"
"""Changes whenever a reader of the former format would go wrong."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Kind = Literal["module", "parameter", "buffer", "attribute", "item", "key", "index"]

_BITS = re.compile(r"[a-z]+([0-9]+)")


class Step(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step from a holder to what it holds.

    Attributes:
        kind: ``module``, ``parameter`` and ``buffer`` are registered in a module; ``attribute`` is in the ``__dict__`` or ``__slots__`` of any
            object; ``item`` is a dict's value under a string or integer, ``key`` one under another key, known by its ``repr``; ``index`` is in a
            list, tuple or deque.
        name: The name, key or index.
    """

    kind: Kind
    name: str | int


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place in a module that refers to a tensor. ``str(slot)`` is what a Python programmer would write.

    Attributes:
        steps: From the root module; the last one is no ``module``.
        persistent: Whether a buffer belongs to the module's state dict.
    """

    steps: tuple[Step, ...]
    persistent: bool = True

    def __str__(self) -> str:
        return path(self.steps)


def path(steps: tuple[Step, ...]) -> str:
    """Steps as a Python programmer would write them."""
    text = ""
    for step in steps:
        if step.kind == "index" or step.kind == "key":
            text += f"[{step.name}]"
        elif step.kind == "item":
            text += f"[{step.name!r}]"
        else:
            text += f".{step.name}" if text else str(step.name)
    return text


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor object.

    Attributes:
        dtype: Its name, without ``torch.``.
        shape: Elements in each dimension.
        stride: Elements from one to the next in each dimension.
        offset: Elements from the storage's start.
        requires_grad: Whether it takes part in differentiation.
        parameter: Whether it is a `torch.nn.Parameter`.
        slots: Every slot that refers to it.
    """

    dtype: str
    shape: tuple[Count, ...]
    stride: tuple[Count, ...]
    offset: Count
    requires_grad: bool
    parameter: bool
    slots: tuple[Slot, ...]

    @property
    def name(self) -> str:
        """The first slot, for messages."""
        return str(self.slots[0])

    def span(self, element_bytes: int) -> tuple[int, int]:
        """Bytes from the storage's start to the first element, and to the end of the last one; 0 and 0 without elements."""
        if 0 in self.shape:
            return 0, 0
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.offset * element_bytes, (last + 1) * element_bytes


class StorageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One storage.

    Attributes:
        offset: Bytes from the arena's base.
        size: Bytes.
        place: ``arena`` for the arena's device, ``cpu`` for a CPU tensor of a module on a GPU.
        shared: Whether all processes use the arena's bytes; else each has a copy of its own.
        tensors: On this storage.
    """

    offset: Count
    size: Count
    place: Literal["arena", "cpu"]
    shared: bool
    tensors: tuple[TensorRecord, ...]


class Plain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="plain"):
    """A number, a string, a truth value or None."""

    value: bool | int | float | str | None


class Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="word"):
    """Something that has a name.

    Attributes:
        kind: ``dtype``, such as ``float16``; ``device``, which is each module's own; ``enum``, as ``module:Class:MEMBER``.
        name: The name.
    """

    kind: Literal["dtype", "device", "enum"]
    name: str


class Items(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="items"):
    """A container that is made anew.

    Attributes:
        kind: Its class.
        items: What is in it; of a ``dict``, keys and values in turn.
    """

    kind: Literal["list", "tuple", "Size", "deque", "set", "frozenset", "dict"]
    items: tuple[Value, ...]


class Same(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="same"):
    """An object that was somewhere in the module before it was loaded."""

    steps: tuple[Step, ...]


class Hole(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hole"):
    """A tensor, which the storages tell of."""


class Gone(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="gone"):
    """Nothing: what was there was removed."""


Value = Plain | Word | Items | Same | Hole | Gone


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something besides tensors that loading has changed in a module.

    Attributes:
        holder: From the root module to what holds it: as the module was before, or, if that is a tensor, as it is afterwards.
        step: From the holder; None if the holder is a container and all that is in it is given.
        value: What it has become.
        of_tensor: Whether the holder is a tensor.
    """

    holder: tuple[Step, ...]
    step: Step | None
    value: Value
    of_tensor: bool = False

    def __str__(self) -> str:
        return path(self.holder if self.step is None else (*self.holder, self.step))


class TensorManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All that a module holds.

    Attributes:
        storages: Its tensors.
        format: Always written.
        changes: What loading has changed besides, where the publisher has kept track of that.
        built: What the module was made of before it was loaded, likewise: by paths, the classes of its modules and other objects, and the dtypes and
            shapes of its tensors.
    """

    storages: tuple[StorageRecord, ...]
    format: str
    changes: tuple[Change, ...] = ()
    built: dict[str, str] = {}


# msgspec lets the second and the third of them through.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Header(msgspec.Struct):
    format: str


def encode(storages: tuple[StorageRecord, ...], changes: tuple[Change, ...] = (), built: Mapping[str, str] | None = None) -> bytes:
    """Write a manifest."""
    return msgspec.msgpack.encode(TensorManifest(storages, FORMAT, changes, dict(built or {})))


def storages_of(data: bytes) -> tuple[StorageRecord, ...]:
    """The storages of a manifest. Whether its tensors lie where they can is not looked at.

    Raises:
        ManifestError: It is no manifest, or of another format.
    """
    return _read(data).storages


def changes_of(data: bytes) -> tuple[Change, ...]:
    """What a manifest says of a module besides tensors.

    Raises:
        ManifestError: It is no manifest, or of another format.
    """
    return _read(data).changes


def built_of(data: bytes) -> dict[str, str]:
    """What a manifest says of a module before it was loaded.

    Raises:
        ManifestError: It is no manifest, or of another format.
    """
    return _read(data).built


def _read(data: bytes) -> TensorManifest:
    try:
        header = msgspec.msgpack.decode(data, type=_Header)
    except _UNREADABLE as error:
        raise ManifestError(f"this is no tensor manifest: {error}", hint="Something other than gms_core.pytorch published it.") from error
    if header.format != FORMAT:
        raise ManifestError(
            f"the tensor manifest has the format {header.format!r}, and only {FORMAT!r} is known here",
            hint="Writer and readers need versions of GMS that know the same format: publish again with this version, or upgrade the older side.",
        )
    try:
        return msgspec.msgpack.decode(data, type=TensorManifest)
    except _UNREADABLE as error:
        raise ManifestError(f"the tensor manifest is damaged: {error}", hint="Publish again.") from error


def element_bytes(dtype: str) -> int | None:
    """Bytes of an element by the name of its dtype, which has its bits in it; None for a name that has none."""
    if dtype == "bool":
        return 1
    bits = _BITS.match(dtype)
    return -(-int(bits[1]) // 8) if bits else None
