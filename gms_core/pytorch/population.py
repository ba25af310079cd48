"""Whether anything was loaded into parameters: new memory is marked, and parameters that are nothing but marks are found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gms_core.errors import UnpopulatedModule
from gms_core.pytorch.discover import discover
from gms_core.pytorch.memory import names
from gms_core.pytorch.tensors import bytes_on, is_unpopulated, why_not_shared

_MARK = 0xD9
"""One byte, so that transposing and slicing keep it. In a row it is no number that weights are filled with: -7.7e15 as bfloat16, -39 as int8."""
_SHORTEST = 4
"""Bytes of a parameter; in fewer the mark could be a value."""
_EMPTY = frozenset({torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided})


@contextlib.contextmanager
def marking(device: torch.device) -> Iterator[None]:
    """While it lasts, what this thread makes with ``torch.empty`` and its like on a device is marked. Any thread may write to it.

    Args:
        device: Where parameters are made; its number does not count.
    """
    with _Marking(device.type):
        yield


def check_populated(module: torch.nn.Module, *, opaque: tuple[type, ...] = ()) -> None:
    """Refuse a module with parameters that were made while new memory was marked, and into which nothing was written.

    One that was written to in part is let pass: engines leave padding as it is. So is one of fewer than 4 bytes, and one that was computed from
    another.

    Args:
        module: To be searched as `gms_core.pytorch.publish` does.
        opaque: Classes whose objects are not searched.

    Raises:
        UnpopulatedModule: Names them, and those that have no memory.
    """
    parameters = [item for item in discover(module, opaque=opaque) if isinstance(item.tensor, torch.nn.Parameter)]
    left = [item.name for item in parameters if is_unpopulated(item.tensor) or _is_marked(item.tensor.detach())]
    if left:
        raise UnpopulatedModule(
            f"nothing was loaded into {len(left)} of {len(parameters)} parameters: {names(left)}",
            hint="The checkpoint lacks them, or its loader does not know their names. Nothing was published.",
        )


def _is_marked(tensor: torch.Tensor) -> bool:
    if why_not_shared(tensor) is not None or tensor.numel() * tensor.element_size() < _SHORTEST:
        return False
    content = tensor.contiguous().view(-1).view(torch.uint8)
    return bool(content[0] == _MARK) and bool((content == _MARK).all())


class _Marking(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY and made.device.type == self._kind and why_not_shared(made) is None:
            bytes_on(made.untyped_storage()).fill_(_MARK)
        return made
