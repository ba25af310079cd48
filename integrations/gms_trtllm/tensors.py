"""Tensors of a module, and tensors at an address, as TensorRT-LLM asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from gms_core.pytorch.discover import discover
from gms_core.pytorch.tensors import storage_at, tensor_on
from gms_trtllm.place import torch_device

TensorKind = Literal["parameter", "buffer", "tensor_attr"]


def module_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, TensorKind]]:
    """Name, tensor and kind of every tensor of a model, each once, under the first of its names. A parameter is one wherever it is found."""
    for item in discover(model):
        kind = item.slots[0].steps[-1].kind
        if isinstance(item.tensor, torch.nn.Parameter):
            yield item.name, item.tensor, "parameter"
        else:
            yield item.name, item.tensor, "buffer" if kind == "buffer" else "tensor_attr"


def tensor_from_pointer(address: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device_index: int) -> torch.Tensor:
    """A tensor over memory that a client keeps.

    Args:
        address: Of the first element.
        shape: Elements in each dimension.
        stride: Elements from one to the next in each dimension.
        dtype: Of the elements.
        device_index: Of the device.
    """
    is_empty = 0 in shape
    elements = 0 if is_empty else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return tensor_on(storage_at(address, elements * dtype.itemsize, torch_device(device_index)), dtype, 0, tuple(shape), tuple(stride))
