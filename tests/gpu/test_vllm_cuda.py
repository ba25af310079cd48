"""Stock engine, writer and reader on a real GPU, with CUDA graphs: equal tokens, and the weights are there once. Needs vLLM beside gms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "examples" / "share_weights" / "benchmark.py"
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
