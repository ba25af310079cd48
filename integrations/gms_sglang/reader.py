"""Every further engine: it builds the model without memory and lets it become what is published. No weight is read, copied or processed again."""

from __future__ import annotations

import time

import sglang.srt.model_loader.loader as stock
import torch
from sglang.srt.model_loader.utils import set_default_torch_dtype

from gms_core.client import ReadLease
from gms_core.errors import LeaseConflict
from gms_core.pytorch import take_over
from gms_core.weights.holdings import Figures, Holding, report
from gms_core.weights.leases import Granted
from gms_sglang.building import COMMUNICATION
from gms_sglang.place import LoadRequest


def attach(request: LoadRequest, holding: Holding, granted: Granted) -> torch.nn.Module:
    """Make the model on top of a committed layout.

    Args:
        request: What to load.
        holding: What keeps the lease.
        granted: The read lease.

    Raises:
        GmsError: The model that this engine builds does not fit what is published.
    """
    lease = granted.lease
    if not isinstance(lease, ReadLease):
        raise LeaseConflict("attaching to a layout needs a read lease")
    start = time.perf_counter()
    arena, layout = lease.map(), lease.layout
    quantisation = stock._get_quantization_config(request.model_config, request.inner)  # noqa: SLF001 - what SGLang's own loaders call
    with set_default_torch_dtype(request.model_config.dtype), torch.device("meta"):
        model = stock._initialize_model(request.model_config, request.inner, quantisation)  # noqa: SLF001 - as above
    take_over(model, layout.manifest, arena, device=request.device, opaque=COMMUNICATION)
    holding.external_bytes = layout.size
    seconds = time.perf_counter() - start
    report(holding, Figures("attached", lease.pool, layout.generation, layout.size, seconds, granted.wait_seconds, checkpoint_bytes=0))
    return model.eval()
