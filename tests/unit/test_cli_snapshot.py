"""``gms snapshot``, against real servers, real files and real processes."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gms_core.cli import gms, snapshot_progress
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import Session
from gms_core.config import SNAPSHOTS, child_environment
from gms_core.layout import Identity
from gms_core.snapshot.orders import Begun, Moving, Waiting
from tests.conftest import RunningServer
from tests.unit.publishing import MODEL, generations, publish, read_all
from tests.unit.sentinels import read_sentinels

BYTES = 17 * 2**20
"""More than a block, so that an image lies in two roots."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SNAPSHOTS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    return [f"--root={tmp_path / name}" for name in ("first", "second")]


def _gms(server: RunningServer | None, *arguments: str) -> Result:
    where = ["--runtime-dir", str(server.directory)] if server is not None else []
    return CliRunner().invoke(gms, ["snapshot", *arguments, *where])


def _done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def _json(result: Result) -> dict[str, Any]:
    document = json.loads(_done(result))
    assert document["schema"] == "gms-snapshot-command/1"
    return document  # type: ignore[no-any-return]


def _refused(result: Result, code: ExitCode) -> str:
    assert result.exit_code == code, result.output
    return result.stderr


def _publish(session: Session, pool: str = "weights", identity: Identity = MODEL, size: int = BYTES) -> bytes:
    data = os.urandom(size)
    publish(session, data, pool=pool, identity=identity, slab=2**20).release()
    return data


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def _read(session: Session, pool: str, size: int = BYTES) -> bytes:
    with session.acquire(pool, "ro", MODEL, timeout_s=1) as lease:
        return read_all(session, lease, size)  # type: ignore[no-any-return]


def test_all_ranks_come_back_when_they_were_saved(server: RunningServer, roots: list[str], tmp_path: Path) -> None:
    control = f"--control-dir={tmp_path / 'control'}"
    with server.connect() as session:
        data = {pool: _publish(session, pool) for pool in ("weights", "weights.1", "other")}
        told = _json(_gms(server, "save", "model", *roots, "--ranks", "--shard-size=16MiB", control, "-o", "json"))
        assert (told["name"], told["version"], told["bytes"]) == ("model", 1, 2 * BYTES)
        assert [image["image"] for image in told["images"]] == ["weights on host", "weights.1 on host"]
        assert all({"hash", "write", "copy", "wait"} <= image["threads"].keys() for image in told["images"])
        assert all(any((tmp_path / root / "model/1/images/0").iterdir()) for root in ("first", "second"))
        saved = read_sentinels(tmp_path / "control", "model")
        assert {state: (one.version, one.id) for state, one in saved.items()} == {"SAVED": (1, told["id"])}
    server.lose_everything()
    text = _done(_gms(server, "restore", "model", *reversed(roots), control))
    assert text.startswith("restored model@1: 34 MiB in 2 images\nweights on host: generation=2 bytes=17825792 seconds=")
    assert read_sentinels(tmp_path / "control", "model").keys() == {"SAVED", "RESTORED"}
    with server.connect() as session:
        assert {pool: _read(session, pool) for pool in ("weights", "weights.1")} == {pool: data[pool] for pool in ("weights", "weights.1")}
        assert [(pool.name, pool.generation) for pool in session.status().pools if pool.generation] == [
            ("weights", 2),
            ("weights.1", 2),
        ]


def test_restore_says_where_it_publishes_and_what_it_leaves_when_it_is_told(server: RunningServer, roots: list[str]) -> None:
    with server.connect() as session:
        data = _publish(session)
        _done(_gms(server, "save", "model", *roots))
        told = _json(_gms(server, "restore", "model@1", *roots, "--if-missing", "-o", "json"))
        assert told["images"] == [{"image": "weights on host", "present": True}]
        _done(_gms(server, "restore", "model", *roots, "--pin"))
        assert generations(session) == [(2, True, True, 0)]
        assert "generation" in _refused(_gms(server, "restore", "model", *roots, "--replace=1"), ExitCode.IDENTITY)
        assert _json(_gms(server, "restore", "model", *roots, "--pool=draft", "--device=host", "-o", "json"))["images"][0]["generation"] == 1
        assert _read(session, "draft") == data


def test_list_shows_what_there_is_when_some_was_pruned(server: RunningServer, roots: list[str]) -> None:
    with server.connect() as session:
        _publish(session)
    for _ in range(3):
        _done(_gms(server, "save", "model", *roots))
    _done(_gms(server, "save", "other", *roots))
    found = _json(_gms(None, "list", *roots, "-o", "json"))["snapshots"]
    assert [(one["name"], one["version"], one["state"], one["size"]) for one in found] == [
        *(("model", version, "committed", BYTES) for version in (1, 2, 3)),
        ("other", 1, "committed", BYTES),
    ]
    assert _done(_gms(None, "prune", "model", *roots, "--keep=2")) == "removed: model@1\n"
    assert _json(_gms(None, "prune", "model", *roots, "--version=3", "-o", "json"))["removed"] == [3]
    table = _done(_gms(None, "list", "model", *roots))
    assert "model@2" in table
    assert "17 MiB" in table
    assert "model@3" not in table
    assert "no snapshot" in _done(_gms(None, "list", "unknown", *roots))
    assert "versions are: 2" in _refused(_gms(server, "restore", "model@3", *roots), ExitCode.NOT_FOUND)


def test_file_is_named_when_it_is_not_what_was_saved(server: RunningServer, roots: list[str], tmp_path: Path) -> None:
    with server.connect() as session:
        _publish(session)
        _done(_gms(server, "save", "model", *roots, "--shard-size=16MiB"))
        assert _done(_gms(None, "verify", "model", *roots)).startswith("verified model@1: 17 MiB in 1 image\nimage 0 (weights): bytes=17825792 ")
        _flip(tmp_path / "second/model/1/images/0/00001.shard", 5000)
        for told in (_gms(None, "verify", "model", *roots), _gms(server, "restore", "model", *roots)):
            assert "second/model/1/images/0/00001.shard" in _refused(told, ExitCode.SNAPSHOT)
        assert generations(session) == [(1, True, False, 0)]


def test_no_rank_is_published_when_the_bytes_of_one_are_wrong(server: RunningServer, roots: list[str], tmp_path: Path) -> None:
    with server.connect() as session:
        for pool in ("weights", "weights.1"):
            _publish(session, pool)
        _done(_gms(server, "save", "model", *roots, "--ranks"))
        _flip(tmp_path / "first/model/1/images/1/00000.shard", 0)
        told = _refused(_gms(server, "restore", "model", *roots, f"--control-dir={tmp_path / 'control'}"), ExitCode.SNAPSHOT)
        assert "gms: weights.1 on host: " in told
        assert [(pool.name, pool.generation, pool.draft_bytes) for pool in session.status().pools] == [("weights", 1, 0), ("weights.1", 1, 0)]
    failed = read_sentinels(tmp_path / "control", "model")["FAILED"]
    assert (failed.doing, failed.version, failed.code) == ("restore", 1, "snapshot_damaged")


def test_snapshot_is_there_and_the_exit_code_tells_when_a_sentinel_cannot_be_written(server: RunningServer, roots: list[str], tmp_path: Path) -> None:
    with server.connect() as session:
        _publish(session)
    (tmp_path / "file").touch()
    result = _gms(server, "save", "model", *roots, f"--control-dir={tmp_path / 'file'}")
    assert result.exit_code not in (0, 1), result.output
    assert result.stdout.startswith("saved model@1")
    assert str(tmp_path / "file") in result.stderr
    _done(_gms(None, "verify", "model", *roots))


def test_environment_is_enough_when_it_says_everything(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.connect() as session:
        _publish(session)
    monkeypatch.setenv("GMS_CHECKPOINT_DIR", str(tmp_path / "artifacts"))
    monkeypatch.setenv("GMS_CONTROL_DIR", str(tmp_path / "control"))
    monkeypatch.setenv("GMS_SAVE_WORKERS", "1")
    _done(_gms(server, "save", "model"))
    assert (tmp_path / "control/model/SAVED").exists()
    monkeypatch.setenv("GMS_LOAD_WORKERS", "x")
    assert "GMS_LOAD_WORKERS" in _refused(_gms(server, "restore", "model"), ExitCode.USAGE)


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["--pool=none"], ExitCode.NOT_FOUND, "pool_not_found"),
        (["--device=GPU-1"], ExitCode.NO_SERVER, "server_unavailable"),
        (["--option=colour=red"], ExitCode.USAGE, "invalid_argument"),
        (["--option=chunk_bytes=1"], ExitCode.USAGE, "invalid_argument"),
        (["--backend=none"], ExitCode.USAGE, "invalid_argument"),
        (["--backend=local-ssd-pinned"], ExitCode.USAGE, "invalid_argument"),
    ],
)
def test_failure_is_told_and_nothing_is_made_when_a_save_cannot_begin(
    server: RunningServer, roots: list[str], tmp_path: Path, arguments: list[str], code: ExitCode, kind: str
) -> None:
    control = f"--control-dir={tmp_path / 'control'}"
    with server.connect() as session:
        _publish(session, size=4096)
    _done(_gms(server, "save", "model", f"--root={tmp_path / 'before'}", control))
    _refused(_gms(server, "save", "model", *roots, control, *arguments), code)
    sentinels = read_sentinels(tmp_path / "control", "model")
    assert {state: sentinel.code for state, sentinel in sentinels.items()} == {"FAILED": kind}
    assert not (tmp_path / "first").exists()


REFUSED = [
    (["save", "../x"], ExitCode.USAGE, "is not a name of a snapshot"),
    (["save", "x", "--backend=none"], ExitCode.USAGE, "there is no transfer backend 'none'"),
    (["save", "x", "--backend=local-ssd-pinned"], ExitCode.USAGE, "does not save"),
    (["save", "x", "--option=chunk"], ExitCode.USAGE, "is not KEY=VALUE"),
    (["save", "x", "--option=colour=red"], ExitCode.USAGE, "has no option 'colour'"),
    (["save", "x", "--shard-size=1MiB"], ExitCode.USAGE, "must be a multiple of 16777216"),
    (["save", "x", "--pool=none"], ExitCode.NOT_FOUND, "no server has a pool 'none'"),
    (["save", "x", "--device=host", "--device=host"], ExitCode.USAGE, "named twice"),
    (["save", "x", "--device=GPU-1"], ExitCode.NO_SERVER, "GPU-1"),
    (["save", "x", "--ranks"], ExitCode.IDENTITY, "differ in content"),
    (["restore", "unknown"], ExitCode.NOT_FOUND, "there is no snapshot unknown"),
    (["restore", "x@0"], ExitCode.USAGE, "no version"),
    (["restore", "kept", "--expect=dtype=fp8"], ExitCode.IDENTITY, "dtype: 'fp8' != 'bf16'"),
    (["restore", "kept", "--expect=dtype"], ExitCode.USAGE, "is not KEY=VALUE"),
    (["restore", "kept", "--device=GPU-1"], ExitCode.NO_SERVER, "GPU-1"),
    (["restore", "kept", "--replace=7"], ExitCode.IDENTITY, "7"),
]


def test_command_is_refused_when_it_cannot_be_carried_out(server: RunningServer, roots: list[str]) -> None:
    with server.connect() as session:
        _publish(session, size=4096)
        _publish(session, "weights.1", Identity({"content": "another"}), size=4096)
        _done(_gms(server, "save", "kept", *roots))
        for arguments, code, why in REFUSED:
            assert why in _refused(_gms(server, *arguments, *roots), code), arguments
        assert [(pool.name, pool.generation) for pool in session.status().pools] == [("weights", 1), ("weights.1", 1)]
    found = _json(_gms(None, "list", *roots, "-o", "json"))["snapshots"]
    assert [one["name"] for one in found if one["state"] == "committed"] == ["kept"]


def test_command_is_refused_when_there_is_no_root_or_too_much_is_said(tmp_path: Path) -> None:
    assert "needs a root" in _refused(_gms(None, "list"), ExitCode.USAGE)
    assert "is no root" in _refused(_gms(None, "list", f"--root={tmp_path}"), ExitCode.NOT_FOUND)
    assert "do not go together" in _refused(_gms(None, "prune", "x", f"--root={tmp_path}", "--keep=1", "--version=1"), ExitCode.USAGE)
    error = json.loads(_refused(_gms(None, "list", "-o", "json"), ExitCode.USAGE))["error"]
    assert error["code"] == "invalid_argument"


def test_bar_is_drawn_when_standard_error_is_a_terminal(server: RunningServer, roots: list[str]) -> None:
    with server.connect() as session:
        _publish(session)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gms_core.cli", "snapshot", "save", "model", *roots, "--runtime-dir", str(server.directory)]
    environment = child_environment(TERM="xterm", COLUMNS="120")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        drawn = b""
        try:
            while data := os.read(ours, 65536):
                drawn += data
        except OSError:  # the terminal has no other end any more
            pass
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"saved model@1: 17 MiB in 1 image")
        assert process.wait(30) == 0
    os.close(ours)
    assert b"weights on host" in drawn
    assert b"17.0" in drawn


def test_save_goes_on_when_its_progress_cannot_be_written(server: RunningServer, roots: list[str]) -> None:
    with server.connect() as session:
        _publish(session, size=4096)
    code = "from gms_core.cli import gms, snapshot_progress; snapshot_progress.EVERY_S = 0; gms()"
    command = [sys.executable, "-c", code, "snapshot", "save", "model", *roots, "--runtime-dir", str(server.directory)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False, timeout=60)
    assert (done.returncode, done.stdout[:13]) == (0, b"saved model@1")


def test_lines_are_few_when_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(snapshot_progress.time, "monotonic", lambda: now)
    lines = snapshot_progress.Lines()
    lines("a", Begun(4 * 2**20))
    for _ in range(2):
        lines("a", Waiting("somebody writes"))
    for moved in range(5):
        now += 2
        lines("a", Moving(moved * 2**20))
    assert capsys.readouterr().err == "a waits: somebody writes\n2 MiB of 4 MiB in 6 s, 341.3 KiB a second\n"
    lines("a", Waiting("\x1b[2Jsomebody"))
    assert capsys.readouterr().err == "a waits: \N{REPLACEMENT CHARACTER}[2Jsomebody\n"


def test_bar_forgets_what_was_waited_for_when_bytes_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    drawn.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setattr(snapshot_progress, "DRAW_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with snapshot_progress.progress("text") as watch:
        watch("weights on host", Begun(8))
        watch("weights on host", Waiting("somebody writes"))
        watch("weights on host", Moving(0))
        assert "weights on host: somebody" in drawn.getvalue()
        drawn.truncate(0)
        watch("weights on host", Moving(4))
    assert "weights on host" in drawn.getvalue()
    assert "somebody" not in drawn.getvalue()
