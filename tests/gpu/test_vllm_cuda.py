"""Real engines on a real GPU, with CUDA graphs: equal tokens, weights that are there once, sleep that gives memory back, and restored snapshots.

Needs vLLM beside gms.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "examples" / "share_weights" / "benchmark.py"
SLEEP = BENCHMARK.with_name("sleep.py")
RESTORE = BENCHMARK.with_name("restore.py")
GIB = 2**30

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(1200)]


def test_reader_adds_no_weights_when_it_answers_as_the_stock_engine_does(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "0.6b", "--requests", "8", "--rounds", "1", "--out", str(figures), "--logs", str(tmp_path / "logs")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(figures.read_text())
    assert told["tokens_equal"] is True
    assert told["reader"]["checkpoint_bytes"] == 0
    assert told["writer"]["memory_without_kv_gib"] - told["reader"]["memory_without_kv_gib"] > 0.9 * told["writer"]["bytes"] / GIB


def test_kv_memory_is_given_back_when_an_engine_sleeps(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SLEEP), "0.6b", "--kv-gib", "16", "--rounds", "2", "--out", str(figures), "--logs", str(tmp_path / "logs")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(figures.read_text())
    assert told["stock"]["tokens_equal"] is told["gms"]["tokens_equal"] is True
    for level in ("level_1", "level_2"):
        assert told["gms"]["awake_gib"] - told["gms"][level]["asleep_gib"] > 15.9


def test_tokens_are_equal_when_an_engine_comes_up_from_a_snapshot_alone(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(RESTORE), "0.6b", "--dir", str(tmp_path), "--out", str(figures), "--logs", str(tmp_path / "logs")]
    ended = subprocess.run([*command, "--kv-cache-memory-bytes", str(4 * GIB)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(figures.read_text())
    assert told["tokens_equal"] is True
    assert told["bytes"] > 0.9 * GIB
