"""The first engine: it loads the checkpoint with vLLM's own loader, into memory that the device server owns, and publishes it."""

from __future__ import annotations

import gc
from typing import Any

import torch
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase, DeviceCommunicatorBase
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from gms_core.client import WriteLease
from gms_core.pytorch import capture, publish
from gms_vllm.cpu import shared_kernels
from gms_vllm.place import LoadRequest
from gms_vllm.processed import check_model

COMMUNICATION = (GroupCoordinator, DeviceCommunicatorBase, All2AllManagerBase)
"""What layers and their kernels hold of vLLM's ranks: buffers and addresses that mean something to one process only."""


def load(request: LoadRequest, inner: BaseModelLoader, lease: WriteLease) -> tuple[torch.nn.Module, bytes]:
    """Load with the inner loader and make the result ready to be published.

    Args:
        request: What to load.
        inner: vLLM's own loader.
        lease: The model's tensors lie in its arena.

    Returns:
        The model, and its manifest.

    Raises:
        GmsError: A layer cannot be shared, or the memory does not suffice.
    """
    _check_before_reading(inner)
    with shared_kernels(writer=True), capture(lease.arena, request.device):
        model = inner.load_model(vllm_config=request.config, model_config=request.model_config, prefix=request.prefix)
    check_model(model)
    gc.collect()
    return model, publish(model, lease.arena, device=request.device, opaque=COMMUNICATION)


def _check_before_reading(inner: BaseModelLoader) -> None:
    """Look at the model once it is built, before its weights are read."""
    load_weights = inner.load_weights

    def checked(model: torch.nn.Module, model_config: Any) -> None:
        check_model(model)
        load_weights(model, model_config)

    inner.load_weights = checked  # an attribute of this one loader, which loads once
