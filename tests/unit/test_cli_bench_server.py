"""``gms bench server`` as a real process, on small numbers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from gms_core.cli.exit_codes import ExitCode

COMMAND = [sys.executable, "-P", "-m", "gms_core.cli", "bench", "server", "--device", "host"]


def run(*options: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, check=False, **how)  # type: ignore[call-overload,no-any-return]


def test_every_figure_is_there_and_the_server_gives_back_what_it_took_when_all_have_gone() -> None:
    done = run("--readers", "20", "--sessions", "40", "--pieces", "300", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "gms-bench-server/1"
    assert [load["readers"] for load in found["loads"]] == [1, 10, 20]
    times = [found["echo"], found["export"], *(load[kind] for load in found["loads"] for kind in ("acquire", "release"))]
    assert all(0 < one["min"] <= one["median"] <= one["max"] for one in times)
    assert len(found["session"]) == 10
    before, full, after = (found[f"server_{when}"]["descriptors"] for when in ("before", "full", "after"))
    assert full >= before + 20
    assert after <= before  # a server that has just begun may have some open that it needs for that alone


@pytest.mark.parametrize("sessions", ["1", "13"])
def test_table_tells_the_same_when_there_are_fewer_sessions_than_parts(sessions: str) -> None:
    done = run("--readers", "1", "--sessions", sessions, "--pieces", "1")
    assert done.returncode == 0, done.stderr
    for word in ("bare Unix socket", "read lease, 1 reader", "1 allocation", "afterwards"):
        assert word in done.stdout


def test_too_few_files_are_told_before_anything_is_measured() -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    done = run("--readers", "1000", preexec_fn=few_files)
    assert done.returncode == ExitCode.USAGE
    assert "may have 512 files open" in done.stderr
    assert "ulimit -Hn" in done.stderr
