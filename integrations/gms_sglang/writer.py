"""The first engine: it loads the checkpoint with SGLang's own loader, into memory that the device server owns, and publishes it."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sglang.srt.model_loader.loader import BaseModelLoader

from gms_core.client import WriteLease
from gms_core.errors import EngineUnsupported, LeaseConflict
from gms_core.layout import Identity
from gms_core.pytorch import Slot, capture, publish
from gms_core.vmm.driver import Access
from gms_core.weights.holdings import Due, Holding, commit
from gms_core.weights.identity import final_identity
from gms_core.weights.leases import Granted
from gms_sglang.building import COMMUNICATION, remembering
from gms_sglang.place import LoadRequest

WEIGHTS = frozenset({"w_kc", "w_vc", "w_scale", "w_scale_k", "w_scale_v"})
"""Weights of MLA attention that are made of others, and are plain attributes (sglang/srt/models/deepseek_common/deepseek_weight_loader.py)."""


def load(
    request: LoadRequest, inner: BaseModelLoader, holding: Holding, granted: Granted, *, files: Sequence[Path], identity: Identity
) -> torch.nn.Module:
    """Load with the inner loader and make the result ready to be published.

    From here on the parameters are read-only. They are published once the engine is ready (see `gms_core.weights.holdings`).

    Args:
        request: What to load.
        inner: SGLang's own loader.
        holding: What keeps the lease.
        granted: The write lease.
        files: The checkpoint, as far as it lies on this machine; its digest is computed meanwhile.
        identity: What was promised when the lease was asked for.

    Raises:
        GmsError: The model cannot be shared, or the memory does not suffice. Nothing is published.
    """
    lease = granted.lease
    if not isinstance(lease, WriteLease):
        raise LeaseConflict("loading into GMS needs a write lease")
    start = time.perf_counter()
    checkpoint_bytes = sum(path.stat().st_size for path in files) if files else -1
    final = final_identity(identity, files)
    with remembering() as built, capture(lease.arena, request.device):
        model = inner.load_model(model_config=request.model_config, device_config=request.device_config)
    if not built:
        raise EngineUnsupported(
            f"{type(inner).__name__} does not build its model as SGLang's other loaders do, and what it changes cannot be told",
            hint="Leave inner out of the block gms.",
        )
    gc.collect()
    manifest = publish(model, lease.arena, device=request.device, weights=_is_weight, opaque=COMMUNICATION, before=built.pop())
    lease.trim()
    lease.arena.set_access(Access.READ)
    commit(Due(holding, lease, manifest, final, time.perf_counter() - start, granted.wait_seconds, checkpoint_bytes))
    return model


def _is_weight(slot: Slot) -> bool:
    return slot.steps[-1].kind == "attribute" and slot.steps[-1].name in WEIGHTS
