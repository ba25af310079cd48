"""``examples/shadow_failover/run.sh`` with fake engines in vLLM's place: what it starts, what it says, and that it ends that and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gms_core.config import child_environment
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.unit.gms_run import ENGINE, PATIENCE_S, answer, processes_of

SCRIPT = Path(__file__).parents[2] / "examples/shadow_failover/run.sh"


class Story:
    """The running script, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line that has the pattern."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it has ended without {pattern!r}: {self.lines}")

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        self.wait_for("logs are in")
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with a ``gms``, and a ``vllm`` that is a fake engine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, command in {"gms": [sys.executable, "-m", "gms_core.cli"], "vllm": ENGINE}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@contextmanager
def story(directory: Path, programs: Path, *arguments: str) -> Iterator[Story]:
    environment = child_environment(
        PATH=f"{programs}:{os.environ['PATH']}", GMS_RUNTIME_DIR=str(directory), GMS_PLUGINS="", DEVICE="host", LOGS=str(programs.parent / "logs")
    )
    with subprocess.Popen([str(SCRIPT), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            yield Story(process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE_S)


def _nothing_left(directory: Path) -> bool:
    """Whether only those processes are left that ended with the script, or do so within the time."""
    deadline = time.monotonic() + PATIENCE_S
    while processes_of(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_of(directory)


def test_shadow_serves_on_the_same_port_when_the_primary_s_group_is_killed(runtime_dir: Path, programs: Path) -> None:
    port = free_port()
    with story(runtime_dir, programs, "MODEL", str(port), "--", "--max-model-len", "128") as told:
        told.wait_for("started a server")
        told.wait_for("engine-1 is standby")
        group = int(told.wait_for(r"kill -KILL -- -(\d+)")[1])
        name, pid, _ = answer(port)
        assert (name, os.getpgid(int(pid))) == ("engine-0", group)
        assert group != os.getpgid(told.process.pid)
        told.wait_for("engines: engine-0 primary, engine-1 standby")
        os.killpg(group, signal.SIGKILL)
        told.wait_for("engines: engine-1 primary$")
        assert answer(port)[0] == "engine-1"
        assert told.interrupt() == 0
    assert _nothing_left(runtime_dir)


def test_server_and_neighbours_live_on_when_the_script_ends(server: RunningServer, programs: Path) -> None:
    neighbour = subprocess.Popen(["sleep", "3600"])  # in the group of the caller
    try:
        with story(server.directory, programs, "MODEL", str(free_port())) as told:
            told.wait_for("using the server that runs")
            told.wait_for("engine-0 is primary")
            assert told.interrupt() == 0
        assert neighbour.poll() is None
        assert _nothing_left(server.directory)
        with server.connect() as session:
            assert session.status().cohorts == ()
    finally:
        neighbour.kill()
        neighbour.wait()


def test_script_fails_with_the_log_when_an_engine_ends_before_it_is_ready(server: RunningServer, programs: Path) -> None:
    with story(server.directory, programs, "MODEL", "0", "--", "--dies-as", "init") as told:
        found = told.wait_for(r"engine-0 has ended; see (\S+)")
        assert "dies as init" in Path(found[1]).read_text()
        told.wait_for("logs are in")
        assert told.process.wait(PATIENCE_S) == 1
    assert _nothing_left(server.directory)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["MODEL", "8000", "more"], 2)])
def test_usage_is_shown_when_it_is_asked_for_or_wrong(arguments: list[str], code: int) -> None:
    result = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert "run.sh [MODEL [PORT]] [-- ENGINE OPTION...]" in (result.stderr if code else result.stdout)
