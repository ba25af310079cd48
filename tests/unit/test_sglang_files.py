"""Which files of a checkpoint SGLang's loaders read, without an SGLang."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gms_core.errors import CheckpointNotFound
from gms_sglang.files import check_checkpoint, weight_files


@pytest.mark.parametrize(
    ("there", "inner", "found"),
    [
        (["model.safetensors", "vae/model.safetensors", "model.bin"], "auto", ["model.safetensors"]),
        (["transformer/a.safetensors", "vision_encoder/b.safetensors"], "auto", ["transformer/a.safetensors", "vision_encoder/b.safetensors"]),
        (["transformer/a.safetensors", "model.bin"], "auto", ["model.bin"]),
        (["transformer/a.safetensors"], "pt", []),
        (["transformer/a.safetensors"], "dummy", []),
    ],
)
def test_weight_files_are_found_when_they_lie_in_folders_of_the_folder(there: list[str], inner: str, found: list[str], tmp_path: Path) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    model = SimpleNamespace(model_path=str(tmp_path), revision=None)
    assert [str(path.relative_to(tmp_path)) for path in weight_files(model, inner, None)] == found
    if found or inner == "dummy":
        check_checkpoint(model, inner)
    else:
        with pytest.raises(CheckpointNotFound, match=r"no weight files \(\*\.pt, \*/\*\.pt\)"):
            check_checkpoint(model, inner)
