"""Weights that another engine has post-processed: which layers can take them over, and how this engine's own post-processing leaves them alone.

vLLM has a flag for it from 0.30 on. Before, an allow-list of methods does, together with what each of them builds besides tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import vllm.model_executor.utils as executor_utils
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gms_core.errors import EngineUnsupported
from gms_vllm.unsupported import STOCK, has_processed_flag

_CONSUMED = ("q_scale", "k_scale", "v_scale", "prob_scale")
"""Parameters that a checkpoint fills and post-processing turns into buffers and numbers."""


def check_model(model: torch.nn.Module) -> None:
    """Refuse layers whose loaded form a second engine could not take over as it is.

    A writer asks this before it reads a byte, so that the answer comes early.

    Raises:
        EngineUnsupported: Names the layer and its method.
    """
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and not _takes_processed(method):
            more = "" if has_processed_flag() else " With vLLM 0.30 or later more methods can be shared."
            raise EngineUnsupported(
                f"layer {name or 'the model itself'}: {type(method).__name__} cannot take over weights that are post-processed already",
                hint=STOCK + more,
            )
        if getattr(module, "is_amx_bmm_enabled", False):
            raise EngineUnsupported(
                f"layer {name}: the AMX attention backend packs its weights into private memory",
                hint="Choose another --attention-backend, or --dtype float32.",
            )


def _takes_processed(method: QuantizeMethodBase) -> bool:
    if has_processed_flag():
        return bool(method.supports_pre_processed_weights)
    # On a GPU the first two do nothing after loading; the others are rebuilt below.
    return type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod) or isinstance(method, BaseKVCacheMethod) or _has_moe_kernel(method)


def _has_moe_kernel(method: QuantizeMethodBase) -> bool:
    return type(method) is UnquantizedFusedMoEMethod and method.experts_cls is not None


@contextlib.contextmanager
def already_processed(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, post-processing builds what is no tensor and leaves all tensors as they are."""
    if has_processed_flag():
        with executor_utils.weights_already_processed():
            yield
        return
    changed: list[Any] = []
    try:
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, BaseKVCacheMethod):
                method.process_weights_after_loading = _take_scales
                changed.append(method)
            elif isinstance(method, QuantizeMethodBase) and _has_moe_kernel(method):
                method.process_weights_after_loading = _MoeKernel(method)
                changed.append(method)
        yield
    finally:
        for method in changed:
            vars(method).pop("process_weights_after_loading", None)


def _take_scales(layer: torch.nn.Module) -> None:
    """Make the host's copies of the scales, which the writer's post-processing has put into buffers."""
    for name in _CONSUMED:
        if hasattr(layer, name):
            delattr(layer, name)
    if hasattr(layer, "_k_scale"):
        for kind in ("q", "k", "v"):
            setattr(layer, f"_{kind}_scale_float", getattr(layer, f"_{kind}_scale").item())
        for kind in ("k", "v"):
            setattr(layer, f"_{kind}_scale_cpu", getattr(layer, f"_{kind}_scale").detach().cpu())


class _MoeKernel:
    """Builds the kernel of an unquantised mixture of experts from weights that are in its layout already."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, layer: Any) -> None:
        from vllm.model_executor.layers.fused_moe.oracle.unquantized import make_unquantized_moe_kernel

        method = self._method
        method.moe_quant_config = method.get_fused_moe_quant_config(layer)
        method.moe_kernel = make_unquantized_moe_kernel(
            quant_config=method.moe_quant_config,
            moe_config=method.moe,
            backend=method.unquantized_backend,
            experts_cls=method.experts_cls,
            routing_tables=layer._expert_routing_tables(),  # noqa: SLF001 - what vLLM's own post-processing passes
        )
