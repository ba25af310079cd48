"""The weight files of a checkpoint, as far as they lie on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gms_core.checkpoint import WEIGHTS, find_weights
from gms_core.weights.files import check_weights, model_folder
from gms_core.weights.identity import DUMMY

PATTERNS = {"auto": WEIGHTS, "pt": ("*.pt",), "npcache": ("*.bin",), "mistral": ("consolidated*.safetensors",)}
"""What SGLang's loaders look for, in this order; the first pattern with a match counts (sglang/srt/model_loader/loader.py)."""
_OTHERS = ("*.safetensors",)


def patterns(inner: str) -> tuple[str, ...]:
    """What to look for: in the folder, and else in the folders in it, where some models name their own patterns (``allow_patterns_overrides``)."""
    here = PATTERNS.get(inner, _OTHERS)
    return (*here, *(f"*/{pattern}" for pattern in here))


def weight_files(model_config: Any, inner: str, download_dir: str | None) -> list[Path]:
    """The files that the inner loader reads, if the model is a folder or was downloaded already; else none. Reads no file."""
    if inner == DUMMY:
        return []
    folder = model_folder(model_config.model_path, model_config.revision, download_dir)
    return [] if folder is None else find_weights(folder, patterns(inner))


def check_checkpoint(model_config: Any, inner: str) -> None:
    """Refuse to load from a folder that has no weights, before anything is allocated.

    Raises:
        CheckpointNotFound: Names the folder and what was looked for.
    """
    if inner != DUMMY:
        check_weights(model_config.model_path, patterns(inner))
