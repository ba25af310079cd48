"""What GMS changes in vLLM, and what it relies on there."""

from gms_patches.for_vllm.patches import (
    CALL_UTILITY,
    CPU_GEMM_DISPATCH,
    CREATE_ENGINE_CONFIG,
    DISTRIBUTIONS,
    PATCHES,
    REQUEST_MEMORY,
    SERVE_HTTP_PATCHES,
    SETUP_SERVER_PATCHES,
    TESTED,
)
from gms_patches.for_vllm.symbols import SYMBOLS

__all__ = [
    "CALL_UTILITY",
    "CPU_GEMM_DISPATCH",
    "CREATE_ENGINE_CONFIG",
    "DISTRIBUTIONS",
    "PATCHES",
    "REQUEST_MEMORY",
    "SERVE_HTTP_PATCHES",
    "SETUP_SERVER_PATCHES",
    "SYMBOLS",
    "TESTED",
]
