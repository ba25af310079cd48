"""What GMS changes in TensorRT-LLM, and what it relies on there."""

from gms_patches.for_trtllm.patches import DISTRIBUTIONS, LOAD_MODEL, MATERIALISE_MEMORY, PATCHES, RELEASE_MEMORY, RELOAD_MODEL, SERVE, TESTED
from gms_patches.for_trtllm.requirements import REQUIREMENTS
from gms_patches.for_trtllm.symbols import ADAPTER, COMMON, NATIVE

__all__ = [
    "ADAPTER",
    "COMMON",
    "DISTRIBUTIONS",
    "LOAD_MODEL",
    "MATERIALISE_MEMORY",
    "NATIVE",
    "PATCHES",
    "RELEASE_MEMORY",
    "RELOAD_MODEL",
    "REQUIREMENTS",
    "SERVE",
    "TESTED",
]
