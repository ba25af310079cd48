"""What adapters ask PyTorch of the device that an engine computes on."""

from __future__ import annotations

import platform

import torch


def free_memory() -> int:
    """Bytes of the current device that are free; 0 where they are not counted."""
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def device_name(*, is_cpu: bool) -> str:
    """The kind of device, as far as kernels and the layout of weights depend on it.

    Args:
        is_cpu: Whether the engine computes on CPUs; else it is the current GPU.
    """
    if is_cpu:
        return f"cpu {platform.machine()}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}"
