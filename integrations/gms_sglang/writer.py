"""The first engine: it loads the checkpoint with SGLang's own loader, into memory that the device server owns, and publishes it."""

from __future__ import annotations

import gc

import torch
from sglang.srt.model_loader.loader import BaseModelLoader

from gms_core.client import WriteLease
from gms_core.errors import EngineUnsupported
from gms_core.pytorch import Slot, capture, publish
from gms_sglang.building import COMMUNICATION, remembering
from gms_sglang.place import LoadRequest

WEIGHTS = frozenset({"w_kc", "w_vc", "w_scale", "w_scale_k", "w_scale_v"})
"""Weights of MLA attention that are made of others, and are plain attributes (sglang/srt/models/deepseek_common/deepseek_weight_loader.py)."""


def load(request: LoadRequest, inner: BaseModelLoader, lease: WriteLease) -> tuple[torch.nn.Module, bytes]:
    """Load with the inner loader and make the result ready to be published.

    Args:
        request: What to load.
        inner: SGLang's own loader.
        lease: The model's tensors lie in its arena.

    Returns:
        The model, and its manifest.

    Raises:
        GmsError: The model cannot be shared, or the memory does not suffice.
    """
    with remembering() as built, capture(lease.arena, request.device):
        model = inner.load_model(model_config=request.model_config, device_config=request.device_config)
    if not built:
        raise EngineUnsupported(
            f"{type(inner).__name__} does not build its model as SGLang's other loaders do, and what it changes cannot be told",
            hint="Leave inner out of the block gms.",
        )
    gc.collect()
    return model, publish(model, lease.arena, device=request.device, weights=_is_weight, opaque=COMMUNICATION, before=built.pop())


def _is_weight(slot: Slot) -> bool:
    return slot.steps[-1].kind == "attribute" and slot.steps[-1].name in WEIGHTS
