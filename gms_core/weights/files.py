"""The weight files of a checkpoint, as far as they lie on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gms_core.checkpoint import find_weights
from gms_core.errors import CheckpointNotFound


def model_folder(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where a model lies: its folder, or where Hugging Face's hub has put it; None if it is not on this machine. Downloads nothing."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def check_weights(model: str, patterns: Sequence[str]) -> None:
    """Refuse to load from a folder that has no weights, before anything is allocated. What is no folder on this machine is not looked at.

    Raises:
        CheckpointNotFound: Names the folder and what was looked for.
    """
    folder = Path(model)
    if folder.is_dir() and not find_weights(folder, patterns):
        raise CheckpointNotFound(
            f"{folder} has no weight files ({', '.join(patterns)}), and nothing that fits is published",
            hint="Restore the files, or start the engine that publishes these weights first.",
        )
