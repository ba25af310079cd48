"""What a server makes in its runtime directory: modes that no umask changes, and whatever lies in the way is refused, not followed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gms_core.cli.serve import take_over
from gms_core.devices import DeviceId
from gms_core.errors import EngineFailed, PermissionRefused
from gms_core.fleet.groups import Group
from gms_core.private_files import open_private
from gms_core.server.journal import Journal
from gms_core.server.listener import bound_socket
from tests.conftest import SERVE, RunningServer, running_server
from tests.unit.publishing import publish

SECRET = b"nobody's business"


def symlink(path: Path) -> None:
    target = path.with_suffix(".target")
    target.write_bytes(SECRET)
    path.symlink_to(target)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_suffix(".nowhere"))


def hard_link(path: Path) -> None:
    target = path.with_suffix(".target")
    target.write_bytes(SECRET)
    os.link(target, path)


def foreign(path: Path) -> None:
    path.touch()
    os.chown(path, 23456, -1)


TRAPS = [symlink, dangling, hard_link, os.mkfifo, Path.mkdir] + ([foreign] if os.getuid() == 0 else [])
Trap = Callable[[Path], None]


@pytest.mark.parametrize("trap", TRAPS)
def test_file_is_refused_when_something_else_has_its_name(runtime_dir: Path, trap: Trap) -> None:
    path = runtime_dir / "file"
    trap(path)
    before = path.lstat()
    with pytest.raises((PermissionRefused, OSError)):
        open_private(path, os.O_RDWR | os.O_CREAT)
    after = path.lstat()
    assert (after.st_mode, after.st_uid, after.st_size) == (before.st_mode, before.st_uid, before.st_size)
    assert not path.with_suffix(".nowhere").exists()


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_file_is_the_users_alone_whatever_the_umask(runtime_dir: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        os.close(open_private(runtime_dir / "file", os.O_RDWR | os.O_CREAT))
        Journal(runtime_dir / "journal").close()
        with bound_socket(runtime_dir / "host.sock"):
            assert stat.S_IMODE((runtime_dir / "host.sock").stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in runtime_dir.iterdir()} == dict.fromkeys(["file", "journal", "host.lock"], 0o600)


def test_mode_is_put_right_when_a_file_of_this_user_was_open_to_others(runtime_dir: Path) -> None:
    (runtime_dir / "file").touch()
    (runtime_dir / "file").chmod(0o666)
    os.close(open_private(runtime_dir / "file", os.O_RDWR))
    assert stat.S_IMODE((runtime_dir / "file").stat().st_mode) == 0o600


@pytest.mark.parametrize("suffix", [".lock", ".journal", ".jnew", ".new", ".sock", ".keep", ".nkp"])
@pytest.mark.parametrize("trap", TRAPS)
def test_server_starts_over_it_or_says_why_not_when_something_lies_in_its_way(runtime_dir: Path, suffix: str, trap: Trap) -> None:
    path = runtime_dir / f"host{suffix}"
    trap(path)
    command = [sys.executable, "-c", SERVE, "host", str(runtime_dir), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stderr is not None
        started = bool(supervisor.stdout.readline())
        if started:
            supervisor.terminate()
        told = supervisor.stderr.read()
    if not started:
        assert re.search(r"^gms_core\.errors\.\w+: ", told, re.MULTILINE), told
    target = path.with_suffix(".target")
    assert not target.exists() or target.read_bytes() == SECRET
    assert not path.with_suffix(".nowhere").exists()


@pytest.mark.parametrize("trap", [symlink, os.mkfifo])
def test_take_over_does_not_hang_when_the_lock_is_no_file(runtime_dir: Path, trap: Trap) -> None:
    trap(runtime_dir / "host.lock")
    if trap is symlink:
        with pytest.raises(PermissionRefused):
            take_over(DeviceId("host"), runtime_dir, only_check=True)
    else:
        take_over(DeviceId("host"), runtime_dir, only_check=True)  # nobody has it locked


@pytest.mark.parametrize("trap", [symlink, dangling, os.mkfifo, Path.mkdir])
def test_log_is_refused_when_its_name_leads_elsewhere(runtime_dir: Path, trap: Trap) -> None:
    trap(runtime_dir / "engine-0.log")
    with pytest.raises(EngineFailed, match="cannot be written"):
        Group(["true"], {}, runtime_dir / "engine-0.log", "start")
    assert not (runtime_dir / "engine-0.nowhere").exists()


def test_nothing_in_the_directory_is_open_to_others_when_a_server_runs(runtime_dir: Path) -> None:
    before = os.umask(0)
    try:
        with running_server(runtime_dir) as server:
            _publish(server)
            server.kill()
            _publish(server)
            modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in runtime_dir.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["host.sock", "host.lock", "host.journal", "host.keep"], 0o600)


def _publish(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"weights").release()
