"""Real SGLang engines on a real GPU, with CUDA graphs: equal tokens, and weights that are there once.

Needs SGLang beside gms, and `ninja` and a compiler for its kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.story import EXAMPLES, PATIENCE_S, used_gib

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("driver"),  # the model is written on the GPU, too
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang beside gms"),
]
OPTIONS = ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--context-length", "2048"]
MEMORY = ["--mem-fraction-static", "0.3", "--max-total-tokens", "20000", "--max-running-requests", "16", "--cuda-graph-max-bs", "16"]
TOKENS = 48


@contextlib.contextmanager
def engine(name: str, folder: Path, variables: dict[str, str], programs: Any, *more: str) -> Iterator[tuple[Any, int]]:
    """A server of the model in the folder, once it is ready, and its port."""
    port = programs.free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder / "model"), "--host", "127.0.0.1", "--port", str(port)]
    with programs.running(name, [*command, *OPTIONS, *MEMORY, *more], folder / f"{name}.log", variables) as running:
        programs.wait_until_healthy(running, port, PATIENCE_S)
        yield running, port


def answers(port: int) -> list[list[int]]:
    """Greedy answers to short and long prompts, one after the other, none from the prefix cache: the numbers depend on the batch's shape."""
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/flush_cache", method="POST"), timeout=60) as answer:
        assert answer.status == 200
    found = []
    for number, length in enumerate((3, 40, 700, 1500)):
        prompt = [3 + (number * 7919 + place * 104729) % 500 for place in range(length)]
        body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            found.append(json.load(answer)["output_ids"])
    return found


def load_seconds(log: Path) -> float:
    """How long SGLang says that loading took."""
    found = re.search(r"Load weight end\. .*?elapsed=([0-9.]+) s", log.read_text(errors="replace"))
    assert found is not None, log.read_text(errors="replace")[-3000:]
    return float(found.group(1))


@pytest.mark.parametrize("shape", ["0.6b"])
def test_reader_adds_no_weights_when_it_answers_as_the_stock_engine_does(
    tmp_path: Path, runtime_dir: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import processes

    processes.write_model(shape, tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    variables = processes.environment(runtime_dir, tmp_path / "cache")
    with engine("stock", tmp_path, variables, processes) as (stock, port):
        right, stock_gib = answers(port), used_gib()
        stock_s = load_seconds(stock.log)
    serving = processes.serving(runtime_dir, tmp_path / "gms.log", variables)
    with serving, engine("writer", tmp_path, variables, processes, "--load-format", "gms") as (writer, port):
        assert answers(port) == right
        alone = used_gib()
        for path in (tmp_path / "model").glob("*.safetensors"):
            path.rename(path.with_suffix(".away"))
        with engine("reader", tmp_path, variables, processes, "--load-format", "gms") as (reader, second):
            assert answers(second) == right
            assert answers(port) == right
            both = used_gib()
            writer_s, reader_s = load_seconds(writer.log), load_seconds(reader.log)
    sys.stdout.write(f"{shape}: loading took {stock_s:.2f} s (stock), {writer_s:.2f} (writer), {reader_s:.2f} (reader); ")
    sys.stdout.write(f"GPU memory {stock_gib:.2f} GiB (stock), {alone:.2f} (server and writer), {both - alone:.2f} more for the reader\n")
    assert both - alone < alone - 0.9 * size / 2**30


def test_memory_is_given_back_when_an_engine_sleeps_and_answers_are_equal_after_it(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import processes

    processes.write_model("0.6b", tmp_path / "model")
    variables = processes.environment(runtime_dir, tmp_path / "cache")
    with (
        processes.serving(runtime_dir, tmp_path / "gms.log", variables),
        engine("sleeper", tmp_path, variables, processes, "--load-format", "gms") as (sleeper, port),
    ):
        right, awake = answers(port), used_gib()
        found = re.search(r"K size: ([0-9.]+) GB, V size: ([0-9.]+) GB", sleeper.log.read_text(errors="replace"))
        assert found is not None
        kv_gib = sum(map(float, found.groups()))
        for _ in range(2):
            occupy(port, "release")
            asleep = used_gib()
            assert awake - asleep > 0.9 * kv_gib
            occupy(port, "resume")
            assert answers(port) == right
            assert abs(used_gib() - awake) < 0.5 * kv_gib
    sys.stdout.write(f"GPU memory {awake:.2f} GiB awake, {asleep:.2f} asleep, with {kv_gib:.2f} of KV memory\n")


def occupy(port: int, what: str) -> None:
    """Have an engine release or resume its memory."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{what}_memory_occupation", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200
