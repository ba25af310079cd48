"""The first engine: it loads the checkpoint with vLLM's own loader, into memory that the device server owns, and publishes it."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase, DeviceCommunicatorBase
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from gms_core.client import WriteLease
from gms_core.errors import LeaseConflict
from gms_core.layout import Identity
from gms_core.pytorch import capture, publish
from gms_core.vmm.driver import Access
from gms_core.weights.holdings import Due, Holding, commit
from gms_core.weights.identity import final_identity
from gms_core.weights.leases import Granted
from gms_vllm.cpu import shared_kernels
from gms_vllm.place import LoadRequest
from gms_vllm.processed import check_model

COMMUNICATION = (GroupCoordinator, DeviceCommunicatorBase, All2AllManagerBase)
"""What layers and their kernels hold of vLLM's ranks: buffers and addresses that mean something to one process only."""


def load(
    request: LoadRequest, inner: BaseModelLoader, holding: Holding, granted: Granted, *, files: Sequence[Path], identity: Identity
) -> torch.nn.Module:
    """Load with the inner loader and make the result ready to be published.

    From here on the parameters are read-only. They are published now, or once the engine is ready (see `gms_core.weights.holdings`).

    Args:
        request: What to load.
        inner: vLLM's own loader.
        holding: What keeps the lease.
        granted: The write lease.
        files: The checkpoint, as far as it lies on this machine; its digest is computed meanwhile.
        identity: What was promised when the lease was asked for.

    Raises:
        GmsError: A layer cannot be shared, or the memory does not suffice. Nothing is published.
    """
    lease = granted.lease
    if not isinstance(lease, WriteLease):
        raise LeaseConflict("loading into GMS needs a write lease")
    start = time.perf_counter()
    checkpoint_bytes = sum(path.stat().st_size for path in files) if files else -1
    final = final_identity(identity, files)
    _check_before_reading(inner)
    with shared_kernels(writer=True), capture(lease.arena, request.device):
        model = inner.load_model(vllm_config=request.config, model_config=request.model_config, prefix=request.prefix)
    check_model(model)
    gc.collect()
    manifest = publish(model, lease.arena, device=request.device, opaque=COMMUNICATION)
    lease.trim()
    lease.arena.set_access(Access.READ)
    seconds = time.perf_counter() - start
    commit(Due(holding, lease, manifest, final, seconds, granted.wait_seconds, checkpoint_bytes))
    return model


def _check_before_reading(inner: BaseModelLoader) -> None:
    """Look at the model once it is built, before its weights are read."""
    load_weights = inner.load_weights

    def checked(model: torch.nn.Module, model_config: Any) -> None:
        check_model(model)
        load_weights(model, model_config)

    inner.load_weights = checked  # an attribute of this one loader, which loads once
