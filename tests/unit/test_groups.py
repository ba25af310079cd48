"""A command and all that it starts is ended to the last process, and nobody else."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gms_core.config import child_environment
from gms_core.errors import EngineFailed
from gms_core.exit_words import how
from gms_core.fleet.groups import Group, last_line, session_of

PATIENCE_S = 60.0
STAYS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(3600)"
OBEYS = "import time; print('up', flush=True); time.sleep(3600)"


def _group(tmp_path: Path, *command: str) -> Group:
    return Group(command, child_environment(), tmp_path / "log", "start")


def _parent(child: str, then: str) -> tuple[str, ...]:
    """A program that starts a child and, once that is up, does something itself."""
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print("both are up", flush=True)
{then}
"""
    return sys.executable, "-c", code


def _wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in log.read_text():
        assert time.monotonic() < deadline


def _settle(group: Group) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not group.settle():
        assert time.monotonic() < deadline
    assert group.living() == []
    return group.reap()


def _wait_for_exit(group: Group) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not group.first_has_exited:
        assert time.monotonic() < deadline


def test_what_the_first_process_left_is_killed_when_that_died_by_itself(tmp_path: Path) -> None:
    group = _group(tmp_path, *_parent(STAYS, "raise SystemExit(5)"))
    _wait_for_exit(group)
    assert len(group.living()) == 1
    assert _settle(group) == 5


def test_first_process_alone_is_asked_when_it_is_to_end(tmp_path: Path) -> None:
    then = "import signal\ndef end(*_):\n    print('child is', child.poll(), flush=True)\n    child.kill()\n    child.wait()\n    sys.exit(0)\n"
    group = _group(tmp_path, *_parent(OBEYS, then + "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(3600)"))
    _wait_for(group.log, "ready")
    group.ask_to_end(PATIENCE_S)
    assert _settle(group) == 0
    assert "child is None" in group.log.read_text()


def test_the_rest_is_asked_too_when_the_first_process_ended_as_asked(tmp_path: Path) -> None:
    says = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('asked', file=sys.stderr, flush=True)))\n"
    group = _group(tmp_path, *_parent(says + "print('up', flush=True)\ntime.sleep(3600)", "time.sleep(3600)"))
    _wait_for(group.log, "both are up")
    group.ask_to_end(PATIENCE_S)
    assert _settle(group) == -signal.SIGTERM
    assert "asked" in group.log.read_text()


@pytest.mark.parametrize("by", ["patience", "kill"])
def test_all_are_killed_when_they_do_not_obey(tmp_path: Path, by: str) -> None:
    group = _group(tmp_path, *_parent(STAYS, f"exec({STAYS!r})"))
    _wait_for(group.log, "up\nup")
    if by == "kill":
        group.ask_to_end(PATIENCE_S)
        group.kill()
    else:
        group.ask_to_end(0.1)
    assert _settle(group) == -signal.SIGKILL
    assert group.killed_for_s >= 0


def test_nobody_else_is_touched_when_a_process_has_left_the_session(tmp_path: Path) -> None:
    away = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(3600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {away!r}]).wait()"
    group = _group(tmp_path, sys.executable, "-c", code)
    deadline = time.monotonic() + PATIENCE_S
    while not last_line(group.log).isdecimal():
        assert time.monotonic() < deadline
    other = int(last_line(group.log))
    group.kill()
    assert _settle(group) == -signal.SIGKILL
    assert session_of(other) == other
    os.kill(other, signal.SIGKILL)


def test_threads_count_as_alive_when_their_first_one_has_ended(tmp_path: Path) -> None:
    code = """
import ctypes, subprocess, sys, threading, time
child = '''
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(3600,)).start()
print("up", flush=True)
ctypes.CDLL(None).pthread_exit(None)
'''
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
while open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
    pass
print("the child's first thread has ended", flush=True)
"""
    group = _group(tmp_path, sys.executable, "-c", code)
    _wait_for_exit(group)
    assert "first thread has ended" in group.log.read_text()
    assert len(group.living()) == 1, "it is shown as a zombie, and lives"
    assert _settle(group) == 0


def test_start_is_refused_when_there_is_no_program_or_no_log(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="cannot be started"):
        _group(tmp_path, str(tmp_path / "absent"))
    for log, why in ((tmp_path / "absent" / "log", "No such file or directory"), (Path("/dev/full"), "No space left on device")):
        with pytest.raises(EngineFailed, match=f"the log {log} cannot be written: {why}") as caught:
            Group(["true"], {}, log, "start")
        assert "--log-dir" in caught.value.hint


def test_end_is_told_in_words_when_it_is_shown(tmp_path: Path) -> None:
    assert how(3) == "exited with code 3"
    assert how(-9) == "was ended by signal SIGKILL"
    assert how(-40) == "was ended by signal 40"
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x" * 5000 + "\nthe reason\n\n")
    assert last_line(log) == "the reason"
    log.write_text("gms: an older one\n--- start\ngms: the reason\nhint: look there\n")
    assert last_line(log, "gms: ") == "gms: the reason"
    assert last_line(log, "gms: ", len("gms: an older one\n--- start\ngms: the reason\n")) == ""


@pytest.mark.parametrize(
    ("heading", "shown"),
    [
        ("vllm serve M --api-key s3cret --port 1", "vllm serve M --api-key *** --port 1"),
        ("vllm serve M --api-key s3cret s3cret2", "vllm serve M --api-key ***"),
        ("vllm serve --api_key=s3cret M --hf-token=s3cret", "vllm serve --api_key=*** M --hf-token=***"),
        ("sh -c 'vllm serve M --hf_token s3cret'", "sh -c 'vllm serve M --hf_token ***"),
        ("sglang serve M --admin-api-key s3cret --ssl-keyfile-password=s3cret", "sglang serve M --admin-api-key *** --ssl-keyfile-password=***"),
        ("vllm serve M --api-key --hf-token --port 1", "vllm serve M --api-key --hf-token --port 1"),
    ],
)
def test_log_has_no_secrets_and_is_its_owners_when_a_command_has_some(tmp_path: Path, heading: str, shown: str) -> None:
    umask = os.umask(0)
    try:
        group = Group(["true"], {}, tmp_path / "log", heading)
    finally:
        os.umask(umask)
    _wait_for_exit(group)
    assert _settle(group) == 0
    assert group.log.read_text().endswith(f" {shown}\n")
    assert group.log.stat().st_mode & 0o777 == 0o600
