"""PyTorch: publish a module's tensors into an arena, and let other modules use them. The only part of GMS that imports torch."""

from gms_core.pytorch.cuda_pool import capture
from gms_core.pytorch.materialise import check_no_meta, materialise
from gms_core.pytorch.memory import Report, TensorArena
from gms_core.pytorch.placed import placed
from gms_core.pytorch.publish import publish
from gms_core.pytorch.slots import SlotFilter
from gms_core.pytorch.state import Remembered
from gms_core.pytorch.take_over import take_over
from gms_core.tensor_manifest import Slot, Step

__all__ = [
    "Remembered",
    "Report",
    "Slot",
    "SlotFilter",
    "Step",
    "TensorArena",
    "capture",
    "check_no_meta",
    "materialise",
    "placed",
    "publish",
    "take_over",
]
