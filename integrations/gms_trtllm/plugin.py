"""What `gms` asks of this adapter. It imports no TensorRT-LLM."""

from __future__ import annotations

from gms_core.plugins.engines import EngineAdapter
from gms_core.plugins.hookspecs import hookimpl
from gms_patches.for_trtllm import DISTRIBUTIONS, REQUIREMENTS, TESTED
from gms_trtllm.command_line import with_gms


@hookimpl
def gms_engines() -> list[EngineAdapter]:
    """The adapter for TensorRT-LLM."""
    return [EngineAdapter("trtllm", "tensorrt_llm", DISTRIBUTIONS, TESTED, REQUIREMENTS, with_gms)]
