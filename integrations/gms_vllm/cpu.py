"""The CPU engine computes on packed private copies of its weights. While GMS loads, layers are told to compute on the parameters themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.platforms import current_platform

from gms_patches.apply import applied
from gms_patches.for_vllm import CPU_GEMM_DISPATCH


@contextlib.contextmanager
def shared_kernels(*, writer: bool) -> Iterator[None]:
    """While it lasts, linear layers that are post-processed compute with ``torch.nn.functional.linear`` and keep their weight.

    On a GPU it does nothing. Layers that are post-processed elsewhere, before or after, keep vLLM's choice.

    Args:
        writer: Whether weights that are no matrices are still to be brought into the kernel's layout; what a reader gets is in it already.
    """
    if not current_platform.is_cpu():
        yield
        return

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
            if layer.weight.dim() == 2:
                layer.cpu_linear = torch.nn.functional.linear
            elif writer:
                original(layer, remove_weight)

        return dispatch

    with applied(CPU_GEMM_DISPATCH, build):
        yield
