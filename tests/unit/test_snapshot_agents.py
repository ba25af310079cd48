"""``gms-saver`` and ``gms-loader``: their environment says everything."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gms_core.cli.exit_codes import ExitCode
from gms_core.config import ENVIRONMENT, SNAPSHOTS, child_environment
from gms_core.layout import Identity
from tests.conftest import RunningServer
from tests.unit.publishing import MODEL, generations, publish, read_all
from tests.unit.sentinels import read_sentinels

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "examples/deploy/kubernetes").glob("snapshot-*.yaml"))


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a console script as it would be if it were installed."""
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][program].partition(":")
    bare = {name: value for name, value in child_environment().items() if name not in SNAPSHOTS}
    code = f"from {module} import {function}; {function}()"
    return subprocess.run([sys.executable, "-c", code], env={**bare, **environment}, capture_output=True, text=True, check=False, timeout=60)


def test_weights_come_back_when_the_environment_says_everything(server: RunningServer, tmp_path: Path) -> None:
    environment = {
        "GMS_RUNTIME_DIR": str(server.directory),
        "GMS_CHECKPOINT_DIR": str(tmp_path / "artifacts"),
        "GMS_CONTROL_DIR": str(tmp_path / "control"),
        "GMS_SNAPSHOT": "model",
        "GMS_DEVICES": "host,",
    }
    with server.connect() as session:
        publish(session, b"weights", pool="draft").release()
        publish(session, b"another", identity=Identity({"content": "another"})).release()
    saved = _run("gms-saver", **environment, GMS_POOL="draft")
    assert (saved.returncode, saved.stdout[:14]) == (0, "saved model@1:"), saved.stderr
    assert read_sentinels(tmp_path / "control", "model").keys() == {"SAVED"}
    for expected in ("generation=", "it is committed already"):  # a Job that is run again publishes nothing twice
        loaded = _run("gms-loader", **environment, GMS_POOL="weights")
        assert loaded.returncode == 0, loaded.stderr
        assert f"weights on host: {expected}" in loaded.stdout
    assert read_sentinels(tmp_path / "control", "model").keys() == {"SAVED", "RESTORED"}
    with server.connect() as session:
        assert generations(session) == [(2, True, False, 0)]
        with session.acquire("weights", "ro", MODEL, timeout_s=1) as lease:
            assert read_all(session, lease, 7) == b"weights"


@pytest.mark.parametrize("program", ["gms-saver", "gms-loader"])
def test_agent_is_refused_when_it_is_not_told_which_snapshot(program: str) -> None:
    refused = _run(program)
    assert refused.returncode == ExitCode.USAGE
    assert refused.stderr.startswith(f"gms: {program} needs GMS_SNAPSHOT")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_job_says_what_exists_when_people_copy_it(job: Path) -> None:
    text = job.read_text()
    named = set(re.findall(r"- name: (GMS_\w+)", text))
    assert named <= ENVIRONMENT.keys()
    assert named >= {"GMS_SNAPSHOT", "GMS_CHECKPOINT_DIR", "GMS_CONTROL_DIR"}
    (program,) = re.findall(r'command: \["([\w-]+)"\]', text)
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert re.search(r'GMS_CHECKPOINT_DIR\n\s+value: "/artifacts"', text)
    assert re.search(r'GMS_CONTROL_DIR\n\s+value: "/control"', text)
    assert ("backoffLimit: 0" in text) == (program == "gms-saver"), "each save is a new version, and a restore is not done twice"


def test_there_is_a_job_for_each_agent_when_the_examples_are_read() -> None:
    assert [job.name for job in JOBS] == ["snapshot-load.yaml", "snapshot-save.yaml"]
