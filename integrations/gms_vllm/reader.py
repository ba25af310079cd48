"""Every further engine: it builds the model without memory and binds its parameters to what is published. No weight is read or copied."""

from __future__ import annotations

import logging

import torch
import vllm.model_executor.model_loader.utils as loader_utils
from vllm.utils.torch_utils import set_default_torch_dtype

from gms_core.client import ReadLease
from gms_core.errors import EngineUnsupported
from gms_core.pytorch import Slot, check_no_meta, materialise
from gms_core.pytorch.manifest import decode
from gms_core.pytorch.slots import read
from gms_core.tensor_manifest import StorageRecord
from gms_vllm.cpu import shared_kernels
from gms_vllm.place import LoadRequest
from gms_vllm.processed import already_processed, check_model
from gms_vllm.tying import follow_publication

log = logging.getLogger("vllm.gms")

DERIVED = ("W_UV", "W_UK_T", "W_K", "W_K_scale", "W_V", "W_V_scale", "W_UK_T_dcp_qrep")
"""Parameters that MLA attention makes of other weights in each post-processing, the flag notwithstanding, and copies into those that are there
already (vllm/model_executor/layers/attention/mla_attention.py): into memory that must not be written."""


def attach(request: LoadRequest, lease: ReadLease) -> torch.nn.Module:
    """Make the model on top of a committed layout.

    Args:
        request: What to load.
        lease: Of the layout.

    Raises:
        GmsError: The model that this engine builds does not fit what is published, or cannot take it over.
    """
    arena, manifest, device = lease.map(), lease.layout.manifest, request.device
    storages = decode(manifest)
    follow_publication(request.model_config, storages)
    with set_default_torch_dtype(request.model_config.dtype):
        with torch.device("meta"):
            model = loader_utils.initialize_model(vllm_config=request.config, model_config=request.model_config, prefix=request.prefix)
        check_model(model)
        check_sizes(model, storages)
        materialise(model, manifest, arena, device=device, rebuilt=_always, allow_changes=True)
        _forget_derived(model)
        with already_processed(model), shared_kernels(writer=False):
            loader_utils.process_weights_after_loading(model, request.model_config, device)
        _forget_consumed(model, storages)
        # What post-processing has made anew in private memory, or what can be reached only now, comes from the layout too.
        materialise(model, manifest, arena, device=device, rebuilt=_is_attribute, allow_changes=True)
    check_no_meta(model)
    return model.eval()


def check_sizes(model: torch.nn.Module, storages: tuple[StorageRecord, ...]) -> None:
    """Refuse caches and work buffers that the writer's engine has sized for other options than this engine's.

    A kernel that believes in this engine's size would read or write behind the end of the writer's.

    Raises:
        EngineUnsupported: Names them, with both shapes.
    """
    differing = [
        f"{slot} is {list(tensor.shape)} and here {list(here.shape)}"
        for storage in storages
        if not storage.shared
        for tensor in storage.tensors
        for slot in tensor.slots
        if isinstance(here := read(model, slot.steps), torch.Tensor) and here.numel() and tuple(here.shape) != tensor.shape
    ]
    if differing:
        raise EngineUnsupported(
            f"published tensors that are no weights have other sizes in this engine: {'; '.join(differing[:5])}",
            hint="Start all engines of a pool with the same --max-model-len, --max-num-batched-tokens and --max-num-seqs, or use another tag.",
        )


def _always(slot: Slot) -> bool:  # noqa: ARG001 - a filter of slots
    """Before post-processing anything may be on one side only."""
    return True


def _is_attribute(slot: Slot) -> bool:
    """What vLLM's quantisation methods and kernels hold is built by vLLM itself; parameters and buffers have to be those of the writer."""
    return slot.steps[-1].kind not in ("parameter", "buffer")


def _forget_derived(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name in DERIVED:
            module._parameters.pop(name, None)  # noqa: SLF001 - deleting the attribute fails where there is none


def _forget_consumed(model: torch.nn.Module, storages: tuple[StorageRecord, ...]) -> None:
    """Remove parameters and buffers without content that the writer has none of: its post-processing has consumed them."""
    published = {str(slot) for storage in storages for tensor in storage.tensors for slot in tensor.slots}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for registry in (module._parameters, module._buffers):  # noqa: SLF001 - deleting the attribute would run the module's own code
            for name, tensor in list(registry.items()):
                if tensor is not None and tensor.is_meta and f"{prefix}.{name}".lstrip(".") not in published:
                    log.debug("%s.%s was consumed by the writer's post-processing", prefix, name)
                    del registry[name]
