"""Reads a tensor manifest strictly: what PyTorch could not make tensors of is refused before anything is made."""

from __future__ import annotations

import torch

from gms_core.errors import ManifestError
from gms_core.tensor_manifest import StorageRecord, TensorRecord, storages_of

_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


def element(tensor: TensorRecord) -> torch.dtype:
    """The dtype."""
    found: torch.dtype = vars(torch)[tensor.dtype]
    return found


def decode(data: bytes) -> tuple[StorageRecord, ...]:
    """Read a manifest, and check that every tensor lies inside its storage.

    Raises:
        ManifestError: It is no manifest, of another format, or contradicts itself.
    """
    storages = storages_of(data)
    _check(storages)
    return storages


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
    _, end = tensor.span(dtype.itemsize)
    if end > storage.size:
        return f"ends at byte {end} of a storage of {storage.size} bytes"
    if storage.size and storage.offset % dtype.itemsize:
        return f"lies at byte {storage.offset} of the arena, which {tensor.dtype} elements cannot"
    if tensor.requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        return f"requires a gradient, which {tensor.dtype} has none of"
    return None
