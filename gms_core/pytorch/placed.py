"""Let tensors that an engine makes for its KV cache lie at addresses of the caller's choice."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from gms_core.pytorch.tensors import bytes_on, storage_at

Place = Callable[[int], int | None]
"""Tells the address for so many bytes, or None for memory of PyTorch's own."""

_SIZED = (torch.zeros, torch.empty, torch.full)
_PLAIN = {"out": None, "requires_grad": False, "pin_memory": False, "layout": torch.strided, "names": None, "memory_format": torch.contiguous_format}
"""Options that change what is made, with the values that do not."""


class _Wanted(NamedTuple):
    """A tensor that is going to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return int(math.prod(self.shape) * self.dtype.itemsize)

    @property
    def is_raw(self) -> bool:
        return len(self.shape) == 1 and self.dtype in (torch.int8, torch.uint8)


@contextlib.contextmanager
def placed(place: Place, device: torch.device, *, raw_only: bool = True) -> Iterator[None]:
    """While it lasts, tensors that this thread makes lie where ``place`` says.

    These are tensors on the device that are made by ``torch.zeros``, ``torch.empty`` or ``torch.full`` with 0. They are not filled: their content is
    what lies at the address. The caller keeps the memory for as long as they are used.

    Args:
        place: Called once for each such tensor with at least one byte.
        device: Where the addresses are valid.
        raw_only: Whether only raw buffers are meant: tensors of one dimension and of bytes (``int8`` or ``uint8``), of which an engine makes others.
    """
    with _Placing(place, _numbered(device), raw_only=raw_only):
        yield


class _Placing(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, place: Place, device: torch.device, *, raw_only: bool) -> None:
        super().__init__()
        self._place = place
        self._device = device
        self._raw_only = raw_only

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        wanted = self._wanted(func, args, options) if func in _SIZED else None
        if wanted is not None and wanted.size and (wanted.is_raw or not self._raw_only):
            address = self._place(wanted.size)
            if address is not None:
                return bytes_on(storage_at(address, wanted.size, self._device)).view(wanted.dtype).view(wanted.shape)
        return func(*args, **options)

    def _wanted(self, func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> _Wanted | None:
        """What is going to be made, if it is a plain tensor on the device, and zero if anything."""
        if any(options.get(name) not in (None, plain) for name, plain in _PLAIN.items()):
            return None
        if func is torch.full and (args[1] if len(args) > 1 else options.get("fill_value")) != 0:
            return None
        chosen = options.get("device")
        if _numbered(torch.get_default_device() if chosen is None else torch.device(chosen)) != self._device:
            return None
        shape, dtype = _shape(func, args, options), options.get("dtype")
        if dtype is None and func is not torch.full:  # which takes it from the value
            dtype = torch.get_default_dtype()
        return None if shape is None or dtype is None else _Wanted(shape, dtype)


def _shape(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The dimensions; None if they are not plain numbers."""
    size: Any = options.get("size", args)
    if func is torch.full and args:
        size = args[0]
    while isinstance(size, (tuple, list)) and len(size) == 1 and isinstance(size[0], (tuple, list)):
        (size,) = size
    dimensions = size if isinstance(size, (tuple, list)) else (size,)
    return tuple(map(operator.index, dimensions)) if all(hasattr(one, "__index__") for one in dimensions) else None


def _numbered(device: torch.device) -> torch.device:
    """The device with a number, so that two names of one device are equal."""
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device(device.type)
