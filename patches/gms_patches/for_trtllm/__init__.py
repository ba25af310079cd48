"""What GMS changes in TensorRT-LLM, and what it relies on there."""

from gms_patches.for_trtllm.patches import (
    BUILD_MANAGERS,
    DISTRIBUTIONS,
    LOAD_MODEL,
    MATERIALISE_MEMORY,
    PATCHES,
    PREPARE_ESTIMATION,
    RELEASE_MEMORY,
    RELOAD_MODEL,
    SERVE,
    TESTED,
)
from gms_patches.for_trtllm.requirements import REQUIREMENTS
from gms_patches.for_trtllm.symbols import ADAPTER, COMMON, GPU_STORAGE, NATIVE, PLACING, VIRTUAL_MEMORY

__all__ = [
    "ADAPTER",
    "BUILD_MANAGERS",
    "COMMON",
    "DISTRIBUTIONS",
    "GPU_STORAGE",
    "LOAD_MODEL",
    "MATERIALISE_MEMORY",
    "NATIVE",
    "PATCHES",
    "PLACING",
    "PREPARE_ESTIMATION",
    "RELEASE_MEMORY",
    "RELOAD_MODEL",
    "REQUIREMENTS",
    "SERVE",
    "TESTED",
    "VIRTUAL_MEMORY",
]
