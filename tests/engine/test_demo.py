"""The demonstration, whole: ``gms serve``, and real ``vllm serve`` on CPU that share weights and stand in for one another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "share_weights" / "demo.py"

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def test_second_engine_answers_without_the_checkpoint_and_a_shadow_serves_when_the_primary_is_killed(tmp_path):
    figures = tmp_path / "demo.json"
    ended = subprocess.run([sys.executable, str(DEMO), "--gpu", "no", "--out", str(figures)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(figures.read_text())
    assert told["tokens_equal"] is True
    assert told["attach_checkpoint_bytes"] == 0
    assert {"publish_s", "attach_s", "server_ready_s", "failed_requests", "kill_to_gone_s"} <= told.keys()
    assert (told["wrong_tokens"], told["max_primaries"]) == (0, 1)
    assert 0 < told["kill_to_first_token_s"] < told["restart_s"]
