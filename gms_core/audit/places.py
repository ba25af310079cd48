"""Which bytes of an arena belong to which tensors, by the manifest."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gms_core.tensor_manifest import StorageRecord, TensorRecord, element_bytes, storages_of


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as it lies in an arena.

    Attributes:
        names: Every slot that refers to it, the first one first.
        offset: Bytes from the arena's base to its first element.
        size: Bytes from its first element to the end of its last one. A tensor with strides may have gaps in them.
        shared: Whether engines compute with these bytes; else each has a copy of its own, made of them when it attached.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    shared: bool

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.size


def tensors_of(manifest: bytes) -> tuple[Tensor, ...]:
    """All tensors with elements that a manifest names, in the order of their offsets.

    One whose dtype or strides are not understood here counts as all of its storage: rather too many bytes than none.

    Raises:
        ManifestError: It is no tensor manifest, or of another format.
    """
    found = (_tensor(storage, record) for storage in storages_of(manifest) for record in storage.tensors)
    return tuple(sorted((tensor for tensor in found if tensor.size), key=lambda tensor: (tensor.offset, tensor.end, tensor.names)))


def _tensor(storage: StorageRecord, record: TensorRecord) -> Tensor:
    start, end = 0, storage.size
    width = element_bytes(record.dtype)
    if width is not None and len(record.shape) == len(record.stride):
        first, last = record.span(width)
        start, end = (first, last) if last <= storage.size else (start, end)
    names = tuple(str(slot) for slot in record.slots) or ("a tensor without a name",)
    return Tensor(names, record.dtype, record.shape, storage.offset + start, end - start, storage.shared)


class Places:
    """Finds tensors by their bytes, and these by the tensors. Tensors may share bytes, as views do.

    Args:
        tensors: In the order of their offsets.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self._starts = [tensor.offset for tensor in self.tensors]
        self._reach = list(itertools.accumulate((tensor.end for tensor in self.tensors), max))
        self._borders = sorted({border for tensor in self.tensors for border in (tensor.offset, tensor.end)})

    def at(self, start: int, end: int) -> tuple[Tensor, ...]:
        """The tensors that have a byte in a range, in the order of their offsets."""
        return tuple(reversed([tensor for tensor in self._before(bisect.bisect_left(self._starts, end), start) if tensor.end > start]))

    def _before(self, index: int, start: int) -> Iterator[Tensor]:
        """Tensors before one, backwards, as far as one of them may reach over ``start``."""
        while index > 0 and self._reach[index - 1] > start:
            index -= 1
            yield self.tensors[index]

    def borders(self, start: int, end: int) -> list[int]:
        """Where tensors begin or end inside of a range: between two of them it is the same tensors that have each byte."""
        return self._borders[bisect.bisect_right(self._borders, start) : bisect.bisect_left(self._borders, end)]
