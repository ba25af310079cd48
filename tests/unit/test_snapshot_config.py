"""How snapshots are configured: options go before the environment, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_core.config import SNAPSHOTS, settings
from gms_core.errors import ConfigurationError
from gms_core.snapshot.config import SnapshotConfig, snapshot_config
from gms_core.snapshot.plan import WeightedRoot, lay_out


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SNAPSHOTS:
        monkeypatch.delenv(name, raising=False)


def test_defaults_hold_when_nothing_is_said() -> None:
    assert snapshot_config() == SnapshotConfig()
    assert SnapshotConfig().stripe_bytes == 64 * 2**20


def test_environment_is_taken_when_the_command_line_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_TRANSFER_BACKEND", "aio")
    monkeypatch.setenv("GMS_SAVE_WORKERS", "3")
    monkeypatch.setenv("GMS_LOAD_WORKERS", "5")
    monkeypatch.setenv("GMS_SHARD_SIZE_BYTES", str(32 * 2**20))
    monkeypatch.setenv("GMS_CONTROL_DIR", "/control")
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", "/artifacts")
    found = snapshot_config({"backend": None, "roots": ()})
    assert found == SnapshotConfig(
        backend="aio", save_workers=3, load_workers=5, shard_bytes=32 * 2**20, control_dir=Path("/control"), roots=(Path("/artifacts"),)
    )


def test_command_line_goes_before_when_the_environment_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_TRANSFER_BACKEND", "aio")
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", "/artifacts")
    found = snapshot_config({"backend": "staged", "save_workers": 0, "roots": (Path("/other"),)})
    assert (found.backend, found.roots) == ("staged", (Path("/other"),))
    monkeypatch.setenv("GMS_SHARDED_SSD_ROOTS", "/a:/b")  # which GMS_CHECKPOINT_DIR contradicts
    monkeypatch.setenv("GMS_SAVE_WORKERS", "many")
    found = snapshot_config({"backend": "staged", "save_workers": 0, "roots": (Path("/other"),)})
    assert (found.save_workers, found.roots) == (0, (Path("/other"),))
    with pytest.raises(ConfigurationError, match="GMS_SAVE_WORKERS"):
        snapshot_config({"roots": (Path("/other"),)})


@pytest.mark.parametrize("text", ["/a:/b", "/a,/b", ":/a,/b:"])
def test_roots_are_several_when_they_are_separated(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GMS_SHARDED_SSD_ROOTS", text)
    assert snapshot_config().roots == (Path("/a"), Path("/b"))


def test_checkpoint_dir_is_the_first_root_when_it_is_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_SHARDED_SSD_ROOTS", "/a:/b")
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", "/b")
    assert snapshot_config().roots == (Path("/b"), Path("/a"))
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", "/c")
    with pytest.raises(ConfigurationError, match="GMS_CHECKPOINT_DIR=/c is none of the directories of GMS_SHARDED_SSD_ROOTS"):
        snapshot_config()


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("GMS_LOAD_WORKERS", "many", "must be a whole number"),
        ("GMS_SAVE_WORKERS", "-1", "must not be less than 0"),
        ("GMS_SHARD_SIZE_BYTES", "1000", "must be a multiple of 16777216"),
        ("GMS_TRANSFER_BACKEND", "none", "there is no transfer backend 'none'"),
        ("GMS_CONTROL_DIR", "control", "must be an absolute path"),
        ("GMS_CHECKPOINT_DIR", "artifacts", "must be an absolute path"),
        ("GMS_SHARDED_SSD_ROOTS", "/a:b", "must be an absolute path"),
    ],
)
def test_variable_is_named_when_its_value_is_wrong(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, why: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=f"^{variable}: .*{why}"):
        snapshot_config()
    settings()  # engines, which save nothing, are not disturbed


@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 4096])
def test_stripes_fill_files_when_files_are_of_an_odd_size(size: int) -> None:
    config = SnapshotConfig(shard_bytes=size * 2**20)
    lay_out(0, "images", [WeightedRoot("root")], stripe_bytes=config.stripe_bytes, shard_bytes=config.shard_bytes)
