"""The supervisor and the socket of a device server, when the start goes wrong."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gms_core.client import connect
from gms_core.errors import GmsError, PermissionRefused, ServerUnavailable
from gms_core.runtime_dir import LONGEST_SOCKET_PATH
from gms_core.server.listener import bound_socket
from gms_core.server.supervisor import serve
from tests.conftest import SERVE, running_server


def test_serve_ends_with_the_reason_when_none_of_several_devices_can_be_served(runtime_dir):
    with running_server(runtime_dir), pytest.raises(GmsError, match=r"already owns|names no device"):
        serve(["host", "no-such-device"], runtime_dir, None, lambda device, path: None)


def test_server_starts_when_modules_of_the_working_directory_have_names_of_the_standard_library(runtime_dir):
    with tempfile.TemporaryDirectory() as elsewhere:
        Path(elsewhere, "logging.py").write_text("raise SystemExit('not the standard library')")
        command = [sys.executable, "-P", "-c", SERVE, "host", str(runtime_dir), "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=elsewhere) as supervisor:
            said = supervisor.stdout.readline()
            supervisor.send_signal(signal.SIGTERM)
            assert said, supervisor.stderr.read()


START_LATER = """
import subprocess, sys
from pathlib import Path
from gms_core.server import supervisor

start, tries = subprocess.Popen, []

def start_the_second_time(*arguments, **options):
    tries.append(arguments)
    if len(tries) == 2:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return start(*arguments, **options)

supervisor.subprocess.Popen = start_the_second_time
sys.exit(supervisor.serve(["host"], Path(sys.argv[1]), None, lambda device, path: print("ready", flush=True)))
"""


def test_server_comes_back_when_its_restart_fails_once(runtime_dir):
    with subprocess.Popen([sys.executable, "-c", START_LATER, str(runtime_dir)], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout.readline() == "ready\n"
        with connect(socket_path=runtime_dir / "host.sock") as session:
            os.kill(session.status().pid, signal.SIGKILL)
        assert supervisor.stdout.readline() == "ready\n"
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(20) == 0


def test_socket_can_be_bound_when_its_path_is_as_long_as_it_may_be(runtime_dir):
    path = runtime_dir / ("x" * (LONGEST_SOCKET_PATH - len(str(runtime_dir)) - len("/.sock")) + ".sock")
    assert len(str(path)) == LONGEST_SOCKET_PATH
    with bound_socket(path):
        assert path.is_socket()
    assert not path.exists()


def test_server_is_refused_with_a_sentence_when_something_else_is_in_the_way(runtime_dir):
    (runtime_dir / "host.lock").symlink_to("/nowhere")
    with pytest.raises(PermissionRefused, match="cannot be made"), bound_socket(runtime_dir / "host.sock"):
        pass
    (runtime_dir / "other.sock").mkdir()
    with pytest.raises(ServerUnavailable, match="cannot be made"), bound_socket(runtime_dir / "other.sock"):
        pass


def test_disk_is_blamed_and_no_permission_when_it_is_full(runtime_dir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ServerUnavailable, match="cannot be made: No space left on device") as caught, bound_socket(runtime_dir / "host.sock"):
        pass
    assert "--runtime-dir" in caught.value.hint


def test_stale_socket_and_lock_are_replaced_when_their_server_was_killed(runtime_dir):
    path = runtime_dir / "host.sock"
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            stack.enter_context(bound_socket(path))
            os.link(path, runtime_dir / "kept")
        (runtime_dir / "kept").rename(path)  # as a server that was killed leaves it
    with bound_socket(path):
        assert path.is_socket()


def test_restarts_are_spaced_further_when_a_server_dies_as_soon_as_it_is_ready(runtime_dir):
    command = [sys.executable, "-c", SERVE, "host", str(runtime_dir), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as supervisor:
        for _ in range(3):
            assert supervisor.stdout.readline()
            with connect(socket_path=runtime_dir / "host.sock") as session:
                os.kill(session.status().pid, signal.SIGKILL)
        assert supervisor.stdout.readline()
        supervisor.send_signal(signal.SIGTERM)
        said = supervisor.stderr.read()
    assert re.findall(r"starting it again in ([0-9.]+) s", said) == ["0.1", "0.2", "0.4"]
