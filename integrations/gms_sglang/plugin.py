"""What `gms` asks of this adapter. It imports no SGLang."""

from __future__ import annotations

from gms_core.plugins.engines import EngineAdapter
from gms_core.plugins.hookspecs import hookimpl
from gms_patches.check import requirements
from gms_patches.for_sglang import DISTRIBUTIONS, PATCHES, SYMBOLS, TESTED
from gms_sglang.command_line import PORT, with_gms


@hookimpl
def gms_engines() -> list[EngineAdapter]:
    """The adapter for SGLang."""
    return [EngineAdapter("sglang", "sglang", DISTRIBUTIONS, TESTED, requirements(SYMBOLS, PATCHES), with_gms, PORT)]
