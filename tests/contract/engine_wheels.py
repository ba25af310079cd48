"""The engines whose wheels the contract tests read, and what GMS knows of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gms_sglang.plugin
import gms_vllm.plugin
from gms_core.plugins.engines import EngineAdapter, WheelSource, open_wheel
from gms_patches import for_sglang, for_vllm
from gms_patches.patch import Patch, Symbol

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "wheels"


@dataclass(frozen=True)
class Engine:
    """An engine, the versions whose wheels are read, and the folder of its adapter."""

    adapter: EngineAdapter
    versions: tuple[str, ...]
    symbols: tuple[Symbol, ...]
    patches: tuple[Patch, ...]
    folder: Path

    def __str__(self) -> str:
        return self.adapter.name

    @contextmanager
    def wheel(self, version: str) -> Iterator[WheelSource]:
        (path,) = WHEELS.glob(f"{self}-{version}-*.whl")
        with open_wheel(self.adapter, path) as source:
            assert source.version == version
            yield source


VLLM = Engine(
    gms_vllm.plugin.gms_engines()[0], ("0.26.0", "0.30.0", "0.33.0"), for_vllm.SYMBOLS, for_vllm.PATCHES, ROOT / "integrations" / "gms_vllm"
)
SGLANG = Engine(
    gms_sglang.plugin.gms_engines()[0],
    ("0.5.16", "0.5.20", "0.5.23"),
    for_sglang.SYMBOLS,
    for_sglang.PATCHES,
    ROOT / "integrations" / "gms_sglang",
)
ENGINES = (VLLM, SGLANG)
