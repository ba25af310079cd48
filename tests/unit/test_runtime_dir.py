"""Where sockets may be, and when a client may connect to one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gms_core.devices import HOST
from gms_core.errors import ConfigurationError, PermissionRefused, ProtocolError, ServerUnavailable
from gms_core.runtime_dir import check_socket, prepare, socket_path

GPU = "GPU-6f3a1b52-0c5d-4e0f-9b1a-2f6f8f0d3c11"
NOBODY = 65534


@pytest.fixture
def listening(runtime_dir: Path):
    path = runtime_dir / "host.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        path.chmod(0o600)
        yield path


def test_socket_is_named_by_its_device_when_a_directory_is_given(runtime_dir: Path) -> None:
    assert socket_path(HOST, runtime_dir) == runtime_dir / "host.sock"
    assert socket_path(GPU, runtime_dir) == runtime_dir / f"{GPU}.sock"


def test_directory_of_the_settings_is_used_when_none_is_given(runtime_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("GMS_RUNTIME_DIR", os.fspath(runtime_dir))
    assert socket_path(HOST) == runtime_dir / "host.sock"


def test_path_is_refused_when_it_is_too_long_for_a_socket() -> None:
    longest = Path("/" + "d" * (107 - len("//host.sock")))
    assert len(os.fsencode(socket_path(HOST, longest))) == 107
    with pytest.raises(ConfigurationError, match="GMS_RUNTIME_DIR"):
        socket_path(HOST, Path(f"{longest}d"))
    with pytest.raises(ConfigurationError, match="108 bytes"):
        check_socket(Path(f"{longest}d/host.sock"))


def test_directory_is_private_when_it_is_made(runtime_dir: Path) -> None:
    before = os.umask(0o277)
    try:
        made = prepare(runtime_dir / "new")
    finally:
        os.umask(before)
    assert made == runtime_dir / "new"
    assert made.stat().st_mode & 0o777 == 0o700


def test_directory_is_taken_when_it_is_private_already(runtime_dir: Path) -> None:
    (runtime_dir / "run").mkdir(0o700)
    assert prepare(runtime_dir / "run") == prepare(runtime_dir / "run")


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_directory_is_refused_when_others_may_enter_it(runtime_dir: Path, mode: int) -> None:
    directory = runtime_dir / "open"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(PermissionRefused, match=f"chmod 700 {directory}"):
        prepare(directory)
    assert directory.stat().st_mode & 0o777 == mode


def test_directory_is_refused_when_it_is_a_link(runtime_dir: Path) -> None:
    (runtime_dir / "real").mkdir(0o700)
    (runtime_dir / "link").symlink_to(runtime_dir / "real")
    with pytest.raises(PermissionRefused, match="is a link"):
        prepare(runtime_dir / "link")


def test_directory_is_refused_when_it_is_a_file(runtime_dir: Path) -> None:
    (runtime_dir / "file").touch(0o600)
    with pytest.raises(PermissionRefused, match="no directory"):
        prepare(runtime_dir / "file")
    with pytest.raises(PermissionRefused, match="cannot be made"):
        prepare(runtime_dir / "file" / "below")


def test_directory_is_refused_when_it_belongs_to_another_user(runtime_dir: Path, monkeypatch) -> None:
    (runtime_dir / "theirs").mkdir(0o700)
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    with pytest.raises(PermissionRefused, match=f"not to {NOBODY}"):
        prepare(runtime_dir / "theirs")


def test_socket_is_accepted_when_it_is_this_users_own(listening: Path) -> None:
    check_socket(listening)


@pytest.mark.parametrize(("name", "command"), [("host.sock", "gms serve --device host"), (f"{GPU}.sock", "gms serve")])
def test_command_is_named_when_no_server_has_a_socket_there(runtime_dir: Path, name: str, command: str) -> None:
    with pytest.raises(ServerUnavailable) as refused:
        check_socket(runtime_dir / name)
    assert refused.value.hint == f"Start it with: {command}"


def test_path_is_refused_when_it_is_no_socket(runtime_dir: Path) -> None:
    (runtime_dir / "host.sock").touch(0o600)
    with pytest.raises(ProtocolError, match="not a socket"):
        check_socket(runtime_dir / "host.sock")


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o601])
def test_socket_is_refused_when_others_may_connect(listening: Path, mode: int) -> None:
    listening.chmod(mode)
    with pytest.raises(PermissionRefused, match=f"chmod 600 {listening}"):
        check_socket(listening)


def test_socket_is_refused_when_it_belongs_to_a_user_who_is_neither_this_one_nor_root(listening: Path, monkeypatch) -> None:
    if os.getuid() == 0:
        os.chown(listening, NOBODY, -1)
        with pytest.raises(PermissionRefused, match=f"belongs to user {NOBODY}"):
            check_socket(listening)
        os.chown(listening, 0, -1)
        monkeypatch.setattr(os, "getuid", lambda: NOBODY)
        check_socket(listening)
    else:
        monkeypatch.setattr(os, "getuid", lambda: NOBODY)
        with pytest.raises(PermissionRefused, match="neither this user nor root"):
            check_socket(listening)
