"""Which tensors of a model are not taken from what is published, because every process makes them for itself."""

from __future__ import annotations

import torch

from gms_core.pytorch.slots import MISSING, SlotFilter, read, read_step
from gms_core.tensor_manifest import Slot

_COMMUNICATION = ("tensorrt_llm._torch.distributed", "tensorrt_llm._ipc_utils", "tensorrt_llm._mnnvl_utils")
"""Where the classes of communicators are: their tensors are tables of addresses of this process, and of its neighbours'."""


def of_communicators(model: torch.nn.Module) -> SlotFilter:
    """Slots in communicators of a model. They are neither published nor overwritten."""

    def is_inside(slot: Slot) -> bool:
        holder: object = model
        for step in slot.steps:
            if type(holder).__module__.startswith(_COMMUNICATION):
                return True
            holder = read_step(holder, step)
            if holder is MISSING:
                break
        return False

    return is_inside


def built_here(model: torch.nn.Module) -> SlotFilter:
    """Slots that a reader fills by itself: those of communicators, and plain attributes that TensorRT-LLM computes once the weights are there."""
    inside = of_communicators(model)

    def is_built(slot: Slot) -> bool:
        return inside(slot) or (slot.steps[-1].kind == "attribute" and read(model, slot.steps) is MISSING)

    return is_built
