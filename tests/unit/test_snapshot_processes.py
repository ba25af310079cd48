"""One process for each image: whatever ends one of them, or whoever started them, nothing goes on and nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import Session
from gms_core.config import child_environment
from gms_core.devices import DeviceId
from gms_core.errors import SnapshotBusy, TransferFailed
from gms_core.snapshot import entry, processes
from gms_core.snapshot.catalogue import entries
from gms_core.snapshot.orders import Order, VerifyOrder
from gms_core.snapshot.roots import open_roots
from gms_core.snapshot.staging import Staging
from tests.conftest import RunningServer
from tests.unit.conftest import InstallPlugin
from tests.unit.publishing import publish, until
from tests.unit.sentinels import read_sentinels
from tests.unit.stuck_backend import FAULTY, SLOW, SOURCE


class Stuck:
    """A command whose transfers never end by themselves."""

    def __init__(self, server: RunningServer, folder: Path, site: Path, arguments: tuple[str, ...]) -> None:
        self.folder = folder
        self.marks = folder / "marks"
        self.marks.mkdir()
        command = [sys.executable, "-m", "gms_core.cli", "snapshot", *arguments, f"--root={folder / 'root'}", f"--control-dir={folder / 'control'}"]
        command += ["--runtime-dir", str(server.directory), "--backend=stuck", f"--option=mark={self.marks}"]
        path = f"{site}{os.pathsep}{child_environment().get('PYTHONPATH', '')}"
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment(PYTHONPATH=path, GMS_PLUGINS="stuck"))

    def children(self, count: int) -> list[int]:
        """The processes that move images, once there are so many."""
        until(lambda: len(list(self.marks.iterdir())) == count or self.process.poll() is not None)
        assert self.process.poll() is None
        return sorted(int(path.name) for path in self.marks.iterdir())

    def ended(self) -> tuple[int, str]:
        """Exit code, and what was told."""
        told = self.process.communicate(timeout=30)[1]
        return self.process.returncode, told


@contextlib.contextmanager
def _stuck(server: RunningServer, folder: Path, install_plugin: InstallPlugin, *arguments: str, source: str = SOURCE) -> Iterator[Stuck]:
    stuck = Stuck(server, folder, install_plugin("stuck", source), arguments)
    try:
        yield stuck
    finally:
        stuck.process.kill()
        stuck.process.communicate()


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def _publish_ranks(session: Session) -> None:
    for pool in ("weights", "weights.1"):
        publish(session, b"x" * 4096, pool=pool).release()


def _pools(session: Session) -> list[tuple[str, int, int, int]]:
    """Name, generation, draft's writer and readers."""
    return [(pool.name, pool.generation, pool.writer, len(pool.readers)) for pool in session.status().pools]


UNTOUCHED = [("weights", 1, 0, 0), ("weights.1", 1, 0, 0)]


def _states(folder: Path) -> list[tuple[int, str]]:
    return [(entry.version, entry.state) for entry in entries(open_roots([folder / "root"]))]


def _save(server: RunningServer, folder: Path, *options: str) -> None:
    arguments = ["snapshot", "save", "model", "--ranks", *options, f"--root={folder / 'root'}", "--runtime-dir", str(server.directory)]
    result = CliRunner().invoke(gms, arguments)
    assert result.exit_code == 0, result.output


def test_images_are_let_go_and_the_next_save_works_when_the_command_is_killed(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--ranks") as stuck:
            children = stuck.children(2)
            assert [readers for *_, readers in _pools(session)] == [1, 1]
            stuck.process.kill()
            until(lambda: all(map(_is_gone, children)))
        until(lambda: _pools(session) == UNTOUCHED)
        assert _states(tmp_path) == [(1, "unfinished")]
        _save(server, tmp_path)
        assert _states(tmp_path) == [(2, "committed")]


def test_name_stays_locked_when_the_command_is_killed_and_its_processes_still_write(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--ranks") as stuck, contextlib.ExitStack() as stack:
            children = stuck.children(2)
            for child in children:  # they end when their input does
                stack.callback(os.close, os.open(f"/proc/{child}/fd/0", os.O_WRONLY))
            stuck.process.kill()
            stuck.process.wait()
            roots = open_roots([tmp_path / "root"])
            for resume in (False, True):
                with pytest.raises(SnapshotBusy):
                    Staging.begin(roots, "model", resume=resume)
            assert _states(tmp_path) == [(1, "saving")]
            assert not any(map(_is_gone, children))
            stack.close()
            until(lambda: all(map(_is_gone, children)))
            _save(server, tmp_path, "--resume")
        assert _states(tmp_path) == [(1, "committed")]


@pytest.mark.parametrize(
    ("number", "code", "why"),
    [(signal.SIGTERM, ExitCode.SNAPSHOT, "told to end by SIGTERM"), (signal.SIGINT, ExitCode.INTERRUPTED, "interrupted from the keyboard")],
)
def test_save_ends_in_order_when_it_is_told_to(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin, number: signal.Signals, code: ExitCode, why: str
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--ranks") as stuck:
            children = stuck.children(2)
            stuck.process.send_signal(number)
            found, told = stuck.ended()
            assert found == code, told
            assert "Traceback" not in told
            assert all(map(_is_gone, children))
        until(lambda: _pools(session) == UNTOUCHED)
    (entry,) = entries(open_roots([tmp_path / "root"]))
    assert (entry.version, entry.state) == (1, "failed")
    assert why in entry.reason
    sentinels = read_sentinels(tmp_path / "control", "model")
    assert sentinels.keys() == {"FAILED"}
    assert why in sentinels["FAILED"].message
    assert sentinels["FAILED"].version == 1
    _save(server, tmp_path, "--resume")
    assert _states(tmp_path) == [(1, "committed")]


def test_others_are_cancelled_and_the_first_reason_is_told_when_one_fails(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--ranks", "--option=fail=1") as stuck:
            code, told = stuck.ended()
            assert code == ExitCode.SNAPSHOT
            assert "on host: the disk burns" in told
            assert "cancelled" not in told
            assert all(_is_gone(int(path.name)) for path in stuck.marks.iterdir())
        until(lambda: _pools(session) == UNTOUCHED)


def test_signal_is_told_when_a_process_is_killed(server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--ranks") as stuck:
            first, second = stuck.children(2)
            os.kill(first, signal.SIGKILL)
            code, told = stuck.ended()
            assert code == ExitCode.SNAPSHOT
            assert "was ended by signal SIGKILL" in told
            assert _is_gone(second)
        until(lambda: _pools(session) == UNTOUCHED)


def test_nothing_is_published_and_no_draft_is_left_when_a_restore_is_told_to_end(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        _save(server, tmp_path)
        with _stuck(server, tmp_path, install_plugin, "restore", "model") as stuck:
            children = stuck.children(2)
            until(lambda: all(writer for _, _, writer, _ in _pools(session)))
            stuck.process.terminate()
            code, told = stuck.ended()
            assert code == ExitCode.SNAPSHOT, told
            assert all(map(_is_gone, children))
        until(lambda: _pools(session) == UNTOUCHED)
        assert read_sentinels(tmp_path / "control", "model").keys() == {"FAILED"}
        assert _states(tmp_path) == [(1, "committed")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, ExitCode.SNAPSHOT), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_all_are_published_and_it_is_told_when_a_restore_that_publishes_is_told_to_end(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin, number: signal.Signals, code: ExitCode
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        _save(server, tmp_path)
        with _stuck(server, tmp_path, install_plugin, "restore", "model", source=SLOW) as stuck:
            children = stuck.children(2)
            stuck.process.send_signal(number)
            (stuck.marks / "go").touch()
            found, told = stuck.ended()
            assert found == code, told
            assert "Traceback" not in told
            assert "Published already: weights on host as generation 2, weights.1 on host as generation 2." in told
            assert all(map(_is_gone, children))
        until(lambda: _pools(session) == [("weights", 2, 0, 0), ("weights.1", 2, 0, 0)])
        assert read_sentinels(tmp_path / "control", "model").keys() == {"FAILED"}


def test_others_are_published_and_it_is_told_when_a_process_is_killed_while_it_publishes(
    server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin
) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        _save(server, tmp_path)
        with _stuck(server, tmp_path, install_plugin, "restore", "model", source=SLOW) as stuck:
            first, _ = stuck.children(2)
            os.kill(first, signal.SIGKILL)
            (stuck.marks / "go").touch()
            code, told = stuck.ended()
            assert code == ExitCode.SNAPSHOT, told
            assert "was ended by signal SIGKILL" in told
            assert re.search(r"memory may have run out\. Published already: weights(.1)? on host as generation 2\.", told)
        until(lambda: sorted(generation for _, generation, *_ in _pools(session)) == [1, 2])


def test_reason_is_told_when_a_backend_raises_what_it_should_not(server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", source=FAULTY) as stuck:
            _, told = stuck.ended()
        assert "gms: ValueError: no such thing" in told
        assert "memory may have run out" not in told
        assert read_sentinels(tmp_path / "control", "model")["FAILED"].message == "ValueError: no such thing"


def test_exit_code_is_told_when_a_process_leaves_without_a_word(server: RunningServer, tmp_path: Path, install_plugin: InstallPlugin) -> None:
    with server.connect() as session:
        _publish_ranks(session)
        with _stuck(server, tmp_path, install_plugin, "save", "model", "--option=leave=1", source=FAULTY) as stuck:
            _, told = stuck.ended()
        assert "its process exited with code 3, and said nothing" in told
        assert "memory may have run out" not in told


def test_interrupt_is_what_is_told_when_it_comes_while_a_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.carry_out([processes.Task("weights", VerifyOrder(index=0, backend="staged", roots=(), snapshot="x@1", id=""))], lambda *_: None)


@pytest.mark.parametrize(
    ("device", "argument", "seen"),
    [("GPU-1", ["GPU-1"], "GPU-1"), ("MIG-2", ["MIG-2"], "MIG-2"), ("host", [], "users own"), (None, [], "users own")],
)
def test_process_sees_its_own_gpu_alone_and_is_told_of_the_others(
    device: DeviceId | None, argument: list[str], seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "users own")
    told = tmp_path / "told"
    started: list[list[str]] = []
    original = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(command[1:])
        return original(["sh", "-c", f'read -r order; printf "%s %s\n" "$CUDA_VISIBLE_DEVICES" "$order" >> {told}; exit 3'], **options)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    order = VerifyOrder(index=0, backend="staged", roots=(), snapshot="x@1", id="")
    with pytest.raises(TransferFailed, match="exited with code 3"):
        processes.carry_out([processes.Task("weights", order, device)], lambda *_: None)
    assert started == [["-P", "-m", "gms_core.snapshot.entry", *argument]]
    visible, _, line = told.read_text().partition(" {")
    assert visible == seen
    assert msgspec.json.decode("{" + line, type=Order) == order
    with pytest.raises(TransferFailed):
        processes.carry_out([processes.Task(str(number), order, device) for number in range(2)], lambda *_: None)
    assert '"at_once":2' in told.read_text()


def test_context_is_left_to_who_needs_it_when_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(entry.ctypes, "CDLL", missing)
    entry.begin_context()
