"""The tensor manifest: what lies where in an arena, and which slots of a module refer to it. Pure data, strict on the way in.

It is per storage: each storage is described once, with its tensors, and each tensor once, with its slots. So ties, views and aliases come back as
they were, and no name is special.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch

from gms_core.errors import ManifestError
from gms_core.pytorch.slots import Slot

FORMAT = "gms-tensors/1"
"""Changes whenever a reader of the former format would go wrong."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


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

    @property
    def element(self) -> torch.dtype:
        """The dtype."""
        found: torch.dtype = vars(torch)[self.dtype]
        return found

    @property
    def end(self) -> int:
        """Bytes from the storage's start to the end of the last element; 0 without elements."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        size: int = self.element.itemsize
        return (last + 1) * size


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


class TensorManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a module holds."""

    storages: tuple[StorageRecord, ...]
    format: str = FORMAT


# msgspec lets the second and the third of them through.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


class _Header(msgspec.Struct):
    format: str


def encode(storages: tuple[StorageRecord, ...]) -> bytes:
    """Write a manifest."""
    return msgspec.msgpack.encode(TensorManifest(storages))


def decode(data: bytes) -> tuple[StorageRecord, ...]:
    """Read a manifest, and check that every tensor lies inside its storage.

    Raises:
        ManifestError: It is no manifest, of another format, or contradicts itself.
    """
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
        manifest = msgspec.msgpack.decode(data, type=TensorManifest)
    except _UNREADABLE as error:
        raise ManifestError(f"the tensor manifest is damaged: {error}", hint="Publish again.") from error
    _check(manifest.storages)
    return manifest.storages


def _check(storages: tuple[StorageRecord, ...]) -> None:
    taken = set()
    for storage in storages:
        for tensor in storage.tensors:
            problem = _problem(storage, tensor)
            if problem:
                raise ManifestError(f"the tensor manifest is damaged: {tensor.name if tensor.slots else 'a tensor'} {problem}", hint="Publish again.")
            for slot in tensor.slots:
                if slot.steps in taken:
                    raise ManifestError(f"the tensor manifest is damaged: {slot} has two tensors", hint="Publish again.")
                taken.add(slot.steps)


def _problem(storage: StorageRecord, tensor: TensorRecord) -> str | None:
    if not tensor.slots or any(not slot.steps or slot.steps[-1].kind == "module" for slot in tensor.slots):
        return "has no slot"
    dtype = vars(torch).get(tensor.dtype)
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTISED:
        return f"has the dtype {tensor.dtype!r}, which this PyTorch does not know"
    if len(tensor.shape) != len(tensor.stride):
        return f"has {len(tensor.shape)} dimensions and {len(tensor.stride)} strides"
    if tensor.end > storage.size:
        return f"ends at byte {tensor.end} of a storage of {storage.size} bytes"
    if storage.size and storage.offset % dtype.itemsize:
        return f"lies at byte {storage.offset} of the arena, which {tensor.dtype} elements cannot"
    if tensor.requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        return f"requires a gradient, which {tensor.dtype} has none of"
    return None
