"""The line by which processes end with the one that began their engine: with real processes that are not its children."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from gms_core.config import child_environment

BEGINS = """
import os, sys
from gms_core.failover.life_line import hold_life_line
hold_life_line()
if os.fork() == 0:
    os.close(1)
    import time; time.sleep(600)
print("ready", flush=True)
sys.stdin.read()
"""
FOLLOWS = """
import sys, time
from gms_core.errors import ConnectionLost
from gms_core.failover.life_line import end_with_life_line
try:
    end_with_life_line()
except ConnectionLost as error:
    sys.exit(f"refused: {error}")
end_with_life_line()
print("ready", flush=True)
time.sleep(600)
"""
PATIENCE_S = 30

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    environment = child_environment(GMS_COHORT=secrets.token_hex(16), GMS_ENGINE="one")
    started = []

    def one(program: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, process_group=0, **pipes))
        return started[-1]

    yield one
    for process in started:
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("way", ["killed", "in order"])
def test_processes_end_when_the_one_that_began_their_engine_ends(start: Start, way: str) -> None:
    first = start(BEGINS)
    ready(first)
    others = [start(FOLLOWS) for _ in range(3)]
    for other in others:
        ready(other)
        assert other.poll() is None
    if way == "killed":  # alone: what it has forked lives on
        first.kill()
    else:
        assert first.stdin is not None
        first.stdin.close()
    assert [other.wait(PATIENCE_S) for other in others] == [-signal.SIGKILL] * 3


def test_process_is_refused_when_nobody_holds_its_line(start: Start) -> None:
    first = start(BEGINS)
    ready(first)
    first.kill()
    first.wait()
    late = start(FOLLOWS)
    assert late.wait(PATIENCE_S) == 1
    assert late.stderr is not None
    assert "refused: the process that began engine one is not there any more" in late.stderr.read()
