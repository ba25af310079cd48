"""Storages of a module as ranges of memory: two storages over the same memory, wholly or in part, are one region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gms_core.errors import ManifestError
from gms_core.pytorch.discover import Found
from gms_core.pytorch.slots import SlotFilter
from gms_core.tensor_manifest import TensorRecord


@dataclass(slots=True)
class Block:
    """One storage of PyTorch, and the tensors on it."""

    storage: Any
    address: int
    size: int
    found: list[Found]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors alone."""
        return [found.tensor for found in self.found]


@dataclass(slots=True)
class Region:
    """A range of memory that no storage crosses the border of."""

    device: torch.device
    address: int
    size: int
    blocks: list[Block]

    def has_weight(self, weights: SlotFilter) -> bool:
        """Whether a tensor in it is a parameter, or in a slot that ``weights`` says yes to."""
        found = [item for block in self.blocks for item in block.found]
        return any(isinstance(item.tensor, torch.nn.Parameter) or any(map(weights, item.slots)) for item in found)

    def records(self) -> tuple[TensorRecord, ...]:
        """Its tensors, as the manifest describes them.

        Raises:
            ManifestError: Two storages overlap at a distance that is no whole number of elements.
        """
        return tuple(_record(found, block.address - self.address) for block in self.blocks for found in block.found)


def regions(found: list[Found]) -> list[Region]:
    """Group tensors by the memory that they are on; regions come in the order in which their first tensor was found."""
    blocks: dict[tuple[torch.device, int], Block] = {}
    for item in found:
        storage = item.tensor.untyped_storage()
        block = blocks.setdefault((storage.device, storage._cdata), Block(storage, storage.data_ptr(), storage.nbytes(), []))  # noqa: SLF001 - its identity
        block.found.append(item)
    order = {id(block): position for position, block in enumerate(blocks.values())}
    merged = [Region(block.storage.device, block.address, 0, [block]) for block in blocks.values() if not block.size]
    sized = (block for block in blocks.values() if block.size)
    for block in sorted(sized, key=lambda block: (str(block.storage.device), block.address, -block.size)):
        last = merged[-1] if merged else None
        if last is not None and last.device == block.storage.device and block.address < last.address + last.size:
            last.size = max(last.size, block.address + block.size - last.address)
            last.blocks.append(block)
        else:
            merged.append(Region(block.storage.device, block.address, block.size, [block]))
    return sorted(merged, key=lambda region: min(order[id(block)] for block in region.blocks))


def _record(found: Found, distance: int) -> TensorRecord:
    tensor = found.tensor
    elements, rest = divmod(distance, tensor.element_size())
    if rest and tensor.numel():
        raise ManifestError(
            f"{found.name} overlaps another storage at a distance of {distance} bytes, which is no whole number of its elements",
            hint="Give it memory of its own (clone it), or leave the slot out with ignore=.",
        )
    return TensorRecord(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        offset=tensor.storage_offset() + elements,
        requires_grad=tensor.requires_grad,
        parameter=isinstance(tensor, torch.nn.Parameter),
        slots=tuple(found.slots),
    )
