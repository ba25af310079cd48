"""What PyTorch does for KV memory that GMS maps beneath its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gms_core.kv.front import View
from gms_core.kv.private import Clear
from gms_core.pytorch.tensors import bytes_on, storage_at
from gms_core.vmm.driver import Address


def clearing(device: torch.device) -> Clear:
    """What makes fresh memory of a device zero; on ``host`` it is.

    Args:
        device: Of the memory. On ``cuda`` that is in granules, so sizes are multiples of eight bytes.
    """

    def clear(address: Address, size: int) -> None:
        if device.type == "cuda":
            bytes_on(storage_at(address, size, device)).view(torch.int64).zero_()
            torch.cuda.synchronize(device)

    return clear


def tensors_of(caches: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors of an engine's KV caches: layers with a state have several."""
    for cache in caches:
        if isinstance(cache, torch.Tensor):
            yield cache
        else:
            yield from tensors_of(cache)


def views_of(caches: Iterable[Any], base: int) -> list[View]:
    """Where all tensors of an engine's KV caches lie.

    Args:
        caches: As of `tensors_of`.
        base: The first address of the KV memory.
    """
    return [
        View(
            tensor.data_ptr() - base,
            tuple(tensor.shape),
            tuple(stride * tensor.element_size() for stride in tensor.stride()),
            tensor.element_size(),
        )
        for tensor in tensors_of(caches)
    ]
