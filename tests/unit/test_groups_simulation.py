"""Simulated groups of ranks: real processes and servers, that get leases, fail over and leave nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(100)
def test_groups_write_read_and_fail_over_when_they_are_simulated(tmp_path: Path) -> None:
    out = tmp_path / "groups.json"
    words = ["--ranks", "1,3", "--servers", "2", "--repeat", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "tools.groups", *words], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    assert [one["ranks"] for one in figures] == [1, 3]
    assert all(value > 0 for one in figures for value in one.values())
