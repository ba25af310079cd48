"""Let an engine's raw buffers of bytes lie at addresses of the caller's choice."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gms_core.pytorch.tensors import bytes_on, storage_at

Place = Callable[[int], int | None]
"""Tells the address for so many bytes, or None for memory of PyTorch's own."""

_SIZED = (torch.zeros, torch.empty, torch.full)
_PLAIN = {"out": None, "requires_grad": False, "pin_memory": False, "layout": torch.strided, "names": None}
"""Options that change what is made, with the values that do not."""


@contextlib.contextmanager
def placed(place: Place, device: torch.device) -> Iterator[None]:
    """While it lasts, raw buffers that this thread makes lie where ``place`` says.

    A raw buffer is a tensor of one dimension and of bytes (``int8`` or ``uint8``) on the device, made by ``torch.zeros``, ``torch.empty`` or
    ``torch.full`` with 0. It is not filled: its content is what lies at the address. The caller keeps the memory for as long as the tensor is used.

    Args:
        place: Called once for each raw buffer with at least one byte.
        device: Where the addresses are valid.
    """
    with _Placing(place, _numbered(device)):
        yield


class _Placing(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, place: Place, device: torch.device) -> None:
        super().__init__()
        self._place = place
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if func in _SIZED and self._is_raw(func, args, options):
            size = _length(func, args, options)
            address = self._place(size) if size else None
            if address is not None:
                return bytes_on(storage_at(address, size or 0, self._device)).view(options["dtype"])
        return func(*args, **options)

    def _is_raw(self, func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        if options.get("dtype") not in (torch.int8, torch.uint8) or any(options.get(name, plain) != plain for name, plain in _PLAIN.items()):
            return False
        if func is torch.full and (args[1] if len(args) > 1 else options.get("fill_value")) != 0:
            return False
        chosen = options.get("device")
        return bool(_numbered(torch.get_default_device() if chosen is None else torch.device(chosen)) == self._device)


def _length(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> int | None:
    """Elements of a tensor of one dimension; None for any other."""
    size: Any = options.get("size", args)
    if func is torch.full and args:
        size = args[0]
    while isinstance(size, (tuple, list)):
        if len(size) != 1:
            return None
        size = size[0]
    return operator.index(size) if hasattr(size, "__index__") else None


def _numbered(device: torch.device) -> torch.device:
    """The device with a number, so that two names of one device are equal."""
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device(device.type)
