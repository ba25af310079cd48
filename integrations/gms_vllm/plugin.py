"""What `gms` asks of this adapter. It imports no vLLM."""

from __future__ import annotations

from gms_core.plugins.engines import EngineAdapter
from gms_core.plugins.hookspecs import hookimpl
from gms_patches.check import requirements
from gms_patches.for_vllm import DISTRIBUTIONS, PATCHES, SYMBOLS, TESTED
from gms_vllm.command_line import over_nodes, with_gms


@hookimpl
def gms_engines() -> list[EngineAdapter]:
    """The adapter for vLLM."""
    return [EngineAdapter("vllm", "vllm", DISTRIBUTIONS, TESTED, requirements(SYMBOLS, PATCHES), with_gms, over_nodes=over_nodes)]
