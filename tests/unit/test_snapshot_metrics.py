"""The file of metrics that a save or a restore leaves, read as Prometheus reads it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.config import SNAPSHOTS
from gms_core.metrics.transfers import TRANSFER_METRICS, Transfer
from gms_core.snapshot.orders import Done, Figures
from tests.conftest import RunningServer
from tests.unit.publishing import publish

BYTES = 17 * 2**20
Values = dict[tuple[str, ...], float]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SNAPSHOTS:
        monkeypatch.delenv(name, raising=False)


def _gms(server: RunningServer, tmp_path: Path, *arguments: str, file: Path | None) -> Result:
    options = [f"--root={tmp_path / 'root'}", "--runtime-dir", str(server.directory), *([f"--metrics-file={file}"] if file else [])]
    return CliRunner().invoke(gms, ["snapshot", *arguments, *options])


def _read(file: Path) -> dict[str, Values]:
    """Values by metric and by the labels' values in the order of the table."""
    found: dict[str, Values] = {}
    for family in text_string_to_metric_families(file.read_text()):
        labels = ("action", "name", *TRANSFER_METRICS[family.name].labels)
        assert family.type == "gauge"
        for sample in family.samples:
            assert set(sample.labels) == set(labels)
            found.setdefault(family.name, {})[tuple(sample.labels[label] for label in labels)] = sample.value
    return found


def _publish(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, bytes(BYTES), slab=2**20).release()


def test_file_has_what_a_save_and_a_restore_have_cost(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gms.prom"
    _publish(server)
    began = time.time()
    assert _gms(server, tmp_path, "save", "model", file=file).exit_code == 0
    saved = _read(file)
    assert saved["gms_snapshot_success"] == {("save", "model"): 1}
    assert saved["gms_snapshot_version"] == {("save", "model"): 1}
    assert began <= saved["gms_snapshot_end_time_seconds"]["save", "model"] <= time.time()
    size = saved["gms_snapshot_image_bytes"]["save", "model", "weights on host"]
    assert size >= BYTES
    assert saved["gms_snapshot_image_seconds"]["save", "model", "weights on host"] > 0
    assert saved["gms_snapshot_image_kept_bytes"] == {("save", "model", "weights on host"): 0}
    assert {step for *_, step in saved["gms_snapshot_step_seconds"]} >= {"sync"}
    assert saved["gms_snapshot_threads_seconds"]

    monkeypatch.setenv("GMS_METRICS_FILE", str(file))
    assert _gms(server, tmp_path, "restore", "model@1", "--replace=1", file=None).exit_code == 0
    restored = _read(file)
    assert restored["gms_snapshot_success"] == {("restore", "model"): 1}
    assert restored["gms_snapshot_image_bytes"] == {("restore", "model", "weights on host"): size}
    assert _gms(server, tmp_path, "restore", "model", "--if-missing", file=None).exit_code == 0
    assert _read(file).keys() == {"gms_snapshot_success", "gms_snapshot_end_time_seconds", "gms_snapshot_version"}
    assert [entry.name for entry in tmp_path.glob("gms.prom*")] == ["gms.prom"]


def test_file_says_that_it_failed_when_it_did(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "gms.prom"
    assert _gms(server, tmp_path, "restore", "model", file=file).exit_code == ExitCode.NOT_FOUND
    failed = _read(file)
    assert failed["gms_snapshot_success"] == {("restore", "model"): 0}
    assert failed.keys() == {"gms_snapshot_success", "gms_snapshot_end_time_seconds"}


def test_snapshot_is_there_and_the_exit_code_tells_when_the_file_cannot_be_written(server: RunningServer, tmp_path: Path) -> None:
    _publish(server)
    result = _gms(server, tmp_path, "save", "model", file=tmp_path / "none" / "gms.prom")
    assert result.exit_code == ExitCode.SNAPSHOT
    assert result.stdout.startswith("saved model@1")
    assert f"cannot be written to {tmp_path / 'none' / 'gms.prom'}" in result.stderr
    assert _gms(server, tmp_path, "restore", "other", file=tmp_path / "none" / "gms.prom").exit_code == ExitCode.NOT_FOUND


def test_nothing_is_begun_when_prometheus_client_is_missing(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(server)
    monkeypatch.delitem(sys.modules, "gms_core.metrics.exposition", raising=False)
    monkeypatch.delattr("gms_core.metrics.exposition", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    result = _gms(server, tmp_path, "save", "model", file=tmp_path / "gms.prom")
    assert result.exit_code == ExitCode.USAGE
    assert "pip install 'gms[metrics]'" in result.stderr
    assert not (tmp_path / "root").exists()


def test_every_metric_of_the_table_has_a_value_with_its_labels() -> None:
    done = Done(Figures(bytes=1, seconds=1.0, threads={"read": 1.0}, around={"sync": 1.0}))
    samples = list(Transfer("save", "model", 1.0, 1, (("weights on host", done), ("weights.1 on host", None))).samples())
    assert {sample.name for sample in samples} == TRANSFER_METRICS.keys()
    for sample in samples:
        assert len(sample.labels) == 2 + len(TRANSFER_METRICS[sample.name].labels)
