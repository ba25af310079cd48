"""Names in /dev/shm are removed when a whole process group is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

PROGRAM = """
import multiprocessing, os, sys
from multiprocessing import resource_tracker, shared_memory
from gms_core.failover.resource_tracker import start_apart


if __name__ == "__main__":
    {start}
    start_apart()
    memory = shared_memory.SharedMemory(create=True, size=4096)
    lock = multiprocessing.get_context("spawn").Lock()
    print(memory.name, lock._semlock.name.lstrip("/"), resource_tracker._resource_tracker._pid, flush=True)
    sys.stdin.readline()
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_group_of(program: str, *, apart: bool) -> tuple[list[str], int]:
    """Names that such a program has made, and its tracker; it has been killed with its group."""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        assert process.stdout is not None
        memory, semaphore, tracker = process.stdout.readline().split()
        if apart:
            wait_until(lambda: os.getsid(int(tracker)) != process.pid)  # it has begun to run its code
        names = [memory, f"sem.{semaphore}"]
        assert all(os.path.exists(f"/dev/shm/{name}") for name in names)
        os.killpg(process.pid, signal.SIGKILL)
    return names, int(tracker)


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_names_and_the_tracker_go_when_the_whole_group_is_killed() -> None:
    names, tracker = kill_group_of(PROGRAM.format(start=""), apart=True)
    wait_until(lambda: not any(os.path.exists(f"/dev/shm/{name}") for name in names))
    wait_until(lambda: gone(tracker))


def test_tracker_that_runs_already_is_not_started_again() -> None:
    names, tracker = kill_group_of(PROGRAM.format(start="resource_tracker.ensure_running()"), apart=False)
    try:
        wait_until(lambda: gone(tracker))  # it was a member of the group
    finally:
        for name in names:
            os.unlink(f"/dev/shm/{name}")


@pytest.mark.parametrize("arguments", [["python"], ["python", "-c"], ["python", "-m", "tracker"]])
def test_unknown_command_line_stays_as_it_is(arguments: list[str]) -> None:
    from gms_core.failover.resource_tracker import _in_own_session

    assert _in_own_session(arguments) == arguments
