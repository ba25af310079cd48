"""The weight files of a checkpoint, as far as they lie on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gms_core.checkpoint import WEIGHTS, find_weights
from gms_core.weights.files import check_weights, model_folder

PATTERNS = {
    "auto": WEIGHTS,
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "mistral": ("consolidated*.safetensors",),
    "npcache": ("*.bin",),
    "pt": ("*.pt",),
}
"""What vLLM's loaders look for, in this order; the first pattern with a match counts (vllm/model_executor/model_loader/default_loader.py)."""
_OTHERS = ("*.safetensors",)


def weight_files(model_config: Any, inner: str, download_dir: str | None = None) -> list[Path]:
    """The files that the inner loader reads, if the model is a folder or was downloaded already; else none. Reads no file."""
    folder = _folder(model_config, download_dir)
    if folder is None or inner == "dummy":
        return []
    return find_weights(folder, PATTERNS.get(inner, _OTHERS))


def check_checkpoint(model_config: Any, inner: str) -> None:
    """Refuse to load from a folder that has no weights, before anything is allocated.

    Raises:
        CheckpointNotFound: Names the folder and what was looked for.
    """
    if inner != "dummy" and not _is_elsewhere(model_config):
        check_weights(model_config.model, PATTERNS.get(inner, _OTHERS))


def _is_elsewhere(model_config: Any) -> bool:
    """Whether the weights are in an object store, and the folder has only what describes them."""
    return bool(getattr(model_config, "model_weights", ""))


def _folder(model_config: Any, download_dir: str | None) -> Path | None:
    if _is_elsewhere(model_config) and Path(model_config.model).is_dir():
        return None
    return model_folder(model_config.model, model_config.revision, download_dir)
