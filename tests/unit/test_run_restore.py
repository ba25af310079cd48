"""``gms run --restore``: what a snapshot has is published before engines start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.config import SNAPSHOTS
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.unit.gms_run import ENGINE, gms_run
from tests.unit.publishing import MODEL, generations, publish, read_all


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SNAPSHOTS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(server: RunningServer, tmp_path: Path) -> Path:
    """A snapshot of a model that the server does not have any more."""
    with server.connect() as session:
        publish(session, b"weights").release()
    result = CliRunner().invoke(gms, ["snapshot", "save", "model", f"--root={tmp_path / 'root'}", "--runtime-dir", str(server.directory)])
    assert result.exit_code == 0, result.output
    server.lose_everything()
    return tmp_path / "root"


def test_weights_are_there_when_engines_start_and_again_when_the_server_has_lost_them(server: RunningServer, root: Path) -> None:
    arguments = ("--restore", "model", "--root", str(root), "--shadows", "0", "--", *ENGINE, "--port", str(free_port()))
    with gms_run(server.directory, *arguments) as run:
        run.wait_for("restore", "starting")
        run.wait_for("restore", "done")
        run.wait_for("engine-0", "primary")
        with server.connect() as session, session.acquire("weights", "ro", MODEL, timeout_s=1) as lease:
            assert read_all(session, lease, 7) == b"weights"
        server.lose_everything()
        run.wait_for("restore", "done")
        with server.connect() as session:
            assert [committed for _, committed, *_ in generations(session)] == [True]
        run.interrupt()
        assert run.wait() == 0
    states = [(event["subject"], event["state"]) for event in run.events]
    assert states.index(("restore", "done")) < states.index(("engine-0", "starting"))


def test_no_engine_is_started_when_the_snapshot_is_damaged(server: RunningServer, root: Path) -> None:
    with (root / "model/1/images/0/00000.shard").open("r+b") as file:
        file.write(b"W")
    with gms_run(server.directory, "--restore", "model@1", "--root", str(root), "--", *ENGINE) as run:
        assert run.wait() == ExitCode.FAILOVER
        told = run.stderr()
        assert re.search(r"is not restored: its command exited with code \d+: /.*00000\.shard is damaged", told), told
        assert "starting" not in run.told("engine-0")
    assert "00000.shard" in (server.directory / "logs/restore.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--restore=other", "--root={root}"], ExitCode.NOT_FOUND, "there is no snapshot other"),
        (["--restore=model"], ExitCode.USAGE, "needs a root"),
        (["--restore=model@x", "--root={root}"], ExitCode.USAGE, "no version"),
        (["--root={root}"], ExitCode.USAGE, "of no use without --restore"),
    ],
)
def test_nothing_is_started_when_there_is_no_such_snapshot(
    server: RunningServer, tmp_path: Path, arguments: list[str], code: ExitCode, why: str
) -> None:
    with server.connect() as session:
        publish(session, b"weights").release()
    assert CliRunner().invoke(gms, ["snapshot", "save", "model", f"--root={tmp_path}", "--runtime-dir", str(server.directory)]).exit_code == 0
    words = [word.format(root=tmp_path) for word in arguments]
    result = CliRunner().invoke(gms, ["run", *words, "--runtime-dir", str(server.directory), "--", *ENGINE])
    assert result.exit_code == code, result.output
    assert why in result.stderr
    assert not (server.directory / "logs").exists()
