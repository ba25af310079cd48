"""The demonstration, whole: ``gms serve`` and three real ``vllm serve`` on CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "share_weights" / "demo.py"

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_second_engine_answers_the_same_when_the_checkpoint_is_gone(tmp_path):
    figures = tmp_path / "demo.json"
    ended = subprocess.run([sys.executable, str(DEMO), "--gpu", "no", "--out", str(figures)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(figures.read_text())
    assert told["tokens_equal"] is True
    assert told["attach_checkpoint_bytes"] == 0
    assert {"publish_s", "attach_s", "server_ready_s"} <= told.keys()
