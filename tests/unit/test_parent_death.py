"""A process of an engine ends with the one that started it, however that one ends; seen on real processes that are killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest

from gms_core.failover.parent_death import end_with_parent

FAMILY = """
import multiprocessing, os, sys, time

CHILD = '''
import multiprocessing, os, sys, time
from gms_core.failover.parent_death import end_with_parent
assert end_with_parent()
print(os.getpid(), flush=True)
if sys.argv[2] == "with grandchild":
    multiprocessing.get_context("spawn").Process(target=exec, args=(GRANDCHILD, {"__name__": "grandchild"})).start()
time.sleep(1000)
'''
GRANDCHILD = '''
import os, time
from gms_core.failover.parent_death import end_with_parent
end_with_parent()
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(1000)
'''
process = multiprocessing.get_context(sys.argv[1]).Process(target=exec, args=(CHILD, {"GRANDCHILD": GRANDCHILD, "__name__": "child"}))
process.start()
if sys.argv[2] == "ends":
    sys.stdin.readline()
    os._exit(0)
time.sleep(1000)
"""


def until_gone(pidfd: int) -> bool:
    """Whether the process of a pidfd has exited, within a generous time."""
    return bool(select.select([pidfd], [], [], 60.0)[0])


@pytest.mark.parametrize(
    ("start", "kind"), [("spawn", "alone"), ("spawn", "with grandchild"), ("fork", "alone"), ("forkserver", "alone"), ("spawn", "ends")]
)
def test_children_end_when_their_parent_does(start: str, kind: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FAMILY, start, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdin is not None
    pidfds: list[int] = []
    try:
        pidfds.extend(os.pidfd_open(int(parent.stdout.readline())) for _ in range(2 if kind == "with grandchild" else 1))
        if kind == "ends":
            parent.stdin.write("\n")
            parent.stdin.flush()
        else:
            parent.send_signal(signal.SIGKILL)
        assert all(until_gone(pidfd) for pidfd in pidfds)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            parent.stdin.close()
        for pidfd in pidfds:
            os.close(pidfd)


FORKS = """
import os, time
from gms_core.failover.parent_death import end_forks_with_this

end_forks_with_this()
for _ in range(2):
    if os.fork():
        break
    print(os.getpid(), flush=True)
time.sleep(1000)
"""


def test_forks_end_when_the_process_that_forked_them_does() -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pidfds: list[int] = []
    try:
        pidfds.extend(os.pidfd_open(int(parent.stdout.readline())) for _ in range(2))  # a child and a grandchild
        parent.kill()
        assert all(until_gone(pidfd) for pidfd in pidfds)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for pidfd in pidfds:
            os.close(pidfd)


def test_nothing_is_watched_when_no_process_of_this_program_has_started_it() -> None:
    assert not end_with_parent()
