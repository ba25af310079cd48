"""Every further engine: it builds the model without memory and lets it become what is published. No weight is read, copied or processed again."""

from __future__ import annotations

import sglang.srt.model_loader.loader as stock
import torch
from sglang.srt.model_loader.utils import set_default_torch_dtype

from gms_core.client import ReadLease
from gms_core.pytorch import take_over
from gms_sglang.building import COMMUNICATION
from gms_sglang.place import LoadRequest


def attach(request: LoadRequest, lease: ReadLease) -> torch.nn.Module:
    """Make the model on top of a committed layout.

    Args:
        request: What to load.
        lease: Of the layout.

    Raises:
        GmsError: The model that this engine builds does not fit what is published.
    """
    arena = lease.map()
    quantisation = stock._get_quantization_config(request.model_config, request.inner)  # noqa: SLF001 - what SGLang's own loaders call
    with set_default_torch_dtype(request.model_config.dtype), torch.device("meta"):
        model = stock._initialize_model(request.model_config, request.inner, quantisation)  # noqa: SLF001 - as above
    take_over(model, lease.layout.manifest, arena, device=request.device, opaque=COMMUNICATION)
    return model.eval()
