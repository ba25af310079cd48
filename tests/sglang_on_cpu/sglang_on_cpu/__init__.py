"""For tests only: SGLang with PyTorch's own kernels, on a machine without a GPU."""

from __future__ import annotations


def activate() -> str:
    """Entry point of the group ``sglang.srt.platforms``: names the platform."""
    return "sglang_on_cpu.platform.PlainTorchPlatform"
