"""Whether anything was loaded into parameters: new memory is marked, and parameters that are nothing but marks are found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gms_core.engine_log import log
from gms_core.errors import UnpopulatedModule
from gms_core.pytorch.discover import discover
from gms_core.pytorch.memory import names
from gms_core.pytorch.tensors import bytes_on, is_unpopulated, why_not_shared

_MARK = 0xD9
"""One byte, so that transposing and slicing keep it. In a row it is no number that weights are filled with: -7.7e15 as bfloat16, -39 as int8."""
_SHORTEST = 4
"""Bytes of a parameter; in fewer the mark could be a value."""
_MATRIX = 2
"""Dimensions."""
_BEGINNING = 16
"""Bytes of a row that are looked at."""
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

    One that was written to in part is let pass with a warning: engines leave padding as it is, but a weight that is fused of several may lack one
    of them. One of fewer than 4 bytes is let pass, and one that was computed from another.

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
    parts = {item.name: part for item in parameters if (part := _part_left(item.tensor.detach()))}
    if parts:
        found = names([f"{name} ({part:.1%})" for name, part in parts.items()])
        log().warning("nothing was loaded into rows of %d parameters: %s; that is padding, or a part of the checkpoint is missing", len(parts), found)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _is_marked(tensor: torch.Tensor) -> bool:
    if why_not_shared(tensor) is not None or tensor.numel() * tensor.element_size() < _SHORTEST:
        return False
    content = _bytes_of(tensor.contiguous())
    return bool(content[0] == _MARK) and bool((content == _MARK).all())


def _part_left(tensor: torch.Tensor) -> float:
    """The part of a matrix's rows, or of those of several matrices, that begin with marks. Less of it is read than what there is."""
    if tensor.dim() < _MATRIX or why_not_shared(tensor) is not None or not tensor.is_contiguous() or not tensor.numel():
        return 0.0
    rows = _bytes_of(tensor).view(-1, tensor.shape[-1] * tensor.element_size())[:, :_BEGINNING]
    return float((rows == _MARK).all(dim=1).float().mean()) if rows.shape[1] >= _SHORTEST else 0.0


class _Marking(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY and made.device.type == self._kind and why_not_shared(made) is None:
            bytes_on(made.untyped_storage()).fill_(_MARK)
        return made
