"""What publishing and materialising ask of an arena, how they say what they did, and what has to live as long as an arena."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Protocol

from gms_core.errors import ManifestError
from gms_core.tensor_manifest import StorageRecord

ALIGNMENT = 512
"""Bytes; what CUDA's own allocators give, and kernels may rely on."""

MOST_NAMES = 20
"""In one message."""


class TensorArena(Protocol):
    """The part of `gms_core.client.arena.Arena` that tensors need."""

    @property
    def base(self) -> int:
        """The first address."""

    @property
    def length(self) -> int:
        """Bytes from the base that are backed by memory."""

    @property
    def used(self) -> int:
        """Bytes from the base that were given out."""

    def allocate(self, size: int, alignment: int = ALIGNMENT) -> int:
        """Give out bytes; returns their offset."""

    def reserve_exact(self, size: int) -> None:
        """Back so many bytes more than are used now."""

    def contains(self, address: int, size: int = 1) -> bool:
        """Whether a range of addresses is backed by memory of this arena."""


@dataclass(frozen=True, slots=True)
class Report:
    """What publishing or materialising came to.

    Attributes:
        tensors: Tensor objects.
        storages: Of those tensors.
        shared_bytes: That all processes use together.
        private_bytes: That each process has for itself.
        copied_bytes: That were copied: into the arena by a writer, out of it by a reader.
        in_place_bytes: That were used where they lay.
    """

    tensors: int
    storages: int
    shared_bytes: int
    private_bytes: int
    copied_bytes: int
    in_place_bytes: int


def report_on(storages: tuple[StorageRecord, ...], copied_bytes: int) -> Report:
    """Sum up what a manifest describes.

    Args:
        storages: Of the manifest.
        copied_bytes: How many of their bytes were copied.
    """
    shared = sum(storage.size for storage in storages if storage.shared)
    total = sum(storage.size for storage in storages)
    return Report(sum(len(storage.tensors) for storage in storages), len(storages), shared, total - shared, copied_bytes, total - copied_bytes)


def names(found: list[str]) -> str:
    """Names for a message: sorted, and not too many."""
    ordered = sorted(found)
    more = len(ordered) - MOST_NAMES
    return ", ".join(ordered[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def check_inside(arena: TensorArena, storages: tuple[StorageRecord, ...]) -> None:
    """Refuse a manifest of which a part lies outside the arena.

    Raises:
        ManifestError: Names the first tensor that does.
    """
    for storage in storages:
        if storage.size and not arena.contains(arena.base + storage.offset, storage.size):
            what = storage.tensors[0].name if storage.tensors else "a storage"
            raise ManifestError(
                f"{what} lies at {storage.offset} + {storage.size} bytes of an arena that has {arena.length}",
                hint="Manifest and memory are of different layouts: attach again, or publish again.",
            )


_kept: weakref.WeakKeyDictionary[TensorArena, list[object]] = weakref.WeakKeyDictionary()


def keep(arena: TensorArena, thing: object) -> None:
    """Keep something for as long as the arena is there."""
    _kept.setdefault(arena, []).append(thing)
