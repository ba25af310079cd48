"""``gms identity``: what it reads, what it remembers, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gms_core.checkpoint import content_digest, find_weights
from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GMS_CACHE_DIR", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "model.bin", "config.json"):
        (model / name).write_bytes(name.encode() * 1000)
    return model


def _identity(*arguments: object) -> Result:
    return CliRunner().invoke(gms, ["identity", *map(str, arguments)])


def _told(*arguments: object) -> dict[str, object]:
    result = _identity(*arguments, "-o", "json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document.pop("schema") == "gms-identity/1"
    return dict(document)


def test_digest_is_that_of_engines_and_is_read_once(folder: Path, tmp_path: Path) -> None:
    first = _told(folder)
    assert first["content"] == content_digest(find_weights(folder), tmp_path / "another cache")
    assert first["files"] == [str(folder / "model-1.safetensors"), str(folder / "model-2.safetensors")]
    assert first["read"]
    again = _told(folder)
    assert (again["content"], again["read"]) == (first["content"], False)
    assert "known already" in _identity(folder).stdout


def test_files_are_read_again_when_forced_and_what_is_found_is_remembered(folder: Path, tmp_path: Path) -> None:
    before = _told(folder)["content"]
    cache = tmp_path / "cache" / "digests.json"
    cache.write_text(cache.read_text().replace('":"', '":"0'))  # as if the cache were wrong
    assert _told(folder)["content"] != before
    forced = _told(folder, "--force")
    assert (forced["content"], forced["read"]) == (before, True)
    assert _told(folder)["content"] == before


def test_single_file_has_a_digest(folder: Path) -> None:
    assert _told(folder / "model.bin")["bytes"] == 9000
    assert "in 1 file, read in" in _identity(folder / "model.bin", "--force").stdout


@pytest.mark.parametrize("place", ["cache", "nowhere"])
def test_checkpoint_is_not_found_when_there_are_no_weights(folder: Path, tmp_path: Path, place: str) -> None:
    result = _identity(tmp_path / place)
    assert result.exit_code == ExitCode.NOT_FOUND
    assert "has no weight files (consolidated*.safetensors" in result.stderr
