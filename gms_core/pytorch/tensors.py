"""What GMS needs of PyTorch below its public interface: storages at an address, storages that change places, tensors in another tensor's clothes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gms_core.pytorch.slots import slot_names

SWAPS_STORAGES = hasattr(torch.UntypedStorage, "_swap_data_ptr_")
"""Whether two storages can change places beneath their tensors (PyTorch 2.12 on), so that views that nobody has found move along."""

LACKS_BYTES = "resolve or replace it before it is published, or leave the slot out with ignore="


def storage_at(address: int, size: int, device: torch.device) -> Any:
    """A storage over memory that somebody else owns and keeps."""
    if size == 0:
        return torch.UntypedStorage(0, device=device)
    return torch._C._construct_storage_from_data_pointer(address, device, size)  # noqa: SLF001 - there is no public way


def tensor_on(storage: Any, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """A tensor on a storage.

    Args:
        storage: An untyped storage.
        dtype: Of the elements.
        offset: Elements.
        shape: Elements in each dimension.
        stride: Elements from one to the next in each dimension.
    """
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)


def bytes_on(storage: Any) -> torch.Tensor:
    """All bytes of a storage, as a tensor."""
    return tensor_on(storage, torch.uint8, 0, (storage.nbytes(),), (1,))


def is_unpopulated(tensor: torch.Tensor) -> bool:
    """Whether a tensor has elements but no memory: on ``meta``, fake, lazy, or with a storage that was freed."""
    if is_lazy(tensor):
        return True
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_nested or is_traceable_wrapper_subclass(tensor):
        return False
    if tensor.is_meta:
        return True
    if not torch._C._has_storage(tensor):  # noqa: SLF001 - there is no public way
        return False
    storage = tensor.untyped_storage()
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(storage.device.type == "meta" or (last + 1) * tensor.element_size() > storage.nbytes())


def is_empty_meta(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on ``meta`` and has no elements: there is nothing in it that could be missing."""
    return not is_lazy(tensor) and tensor.is_meta and tensor.numel() == 0


def why_not_shared(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be described by bytes, a shape and strides, or None."""
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, which wraps other tensors"
    if tensor.layout != torch.strided:
        return f"has the layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "is of one of PyTorch's quantised types"
    if tensor.is_nested:
        return "is a nested tensor"
    if not torch._C._has_storage(tensor):  # noqa: SLF001 - there is no public way
        return "has no storage"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazy conjugate or negative"
    return None


def dressed_as(model: torch.Tensor | None, value: torch.Tensor, *, parameter: bool, requires_grad: bool) -> torch.Tensor:
    """A tensor on the memory of ``value`` that has the class and the attributes of ``model``, where it fits.

    Args:
        model: A parameter, if a parameter is wanted, and vice versa; else only the wish counts.
        value: A plain tensor.
        parameter: Whether a parameter is wanted.
        requires_grad: Whether it takes part in differentiation.
    """
    if model is None or isinstance(model, torch.nn.Parameter) != parameter:
        return torch.nn.Parameter(value, requires_grad) if parameter else value.requires_grad_(requires_grad)
    result: torch.Tensor = torch.Tensor._make_subclass(type(model), value, requires_grad)  # noqa: SLF001 - what Parameter itself does
    vars(result).update(vars(model))
    for name in slot_names(type(model)):
        if hasattr(model, name):
            setattr(result, name, getattr(model, name))
    return result


def move_storage(storage: Any, tensors: list[torch.Tensor], target: Any) -> Any:
    """Let tensors use another storage of the same size; objects, classes, attributes and views stay what they are.

    Args:
        storage: What the tensors use now.
        tensors: All that are known to use it.
        target: The storage to use.

    Returns:
        Something that keeps the memory that was used before.
    """
    if SWAPS_STORAGES:
        storage._swap_data_ptr_(target)
        return target
    for tensor in tensors:
        tensor.data = tensor_on(target, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return storage


def has_overlap(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor may share memory with one another."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
