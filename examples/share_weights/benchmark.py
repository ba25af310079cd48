"""What sharing costs and saves on a GPU: a stock engine, a writer and a reader of one model, in one run.

Each engine gets the same KV cache (``--kv-cache-memory-bytes``), so the rest of its memory can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model import SHAPES, write_model
from processes import Program, ProgramError, complete, environment, free_port, kept_logs, program, running, serving, tell, wait_until_healthy

GIB = 2**30
KV_BYTES = 16 * GIB
VLLM = program("vllm")
PROMPT_TOKENS, NEW_TOKENS = 512, 128


def used_bytes() -> int:
    """Bytes of the first GPU that are in use, by whomever."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


class Bench:
    """The programs under test, on one model."""

    def __init__(self, directory: Path, shape: str, requests: int, rounds: int) -> None:
        self.model = directory / "model"
        self.runtime = directory / "run"
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.requests, self.rounds, self.shape = requests, rounds, shape
        self.environment = environment(self.runtime, directory / "cache")

    @contextlib.contextmanager
    def engine(self, name: str, *options: str) -> Iterator[tuple[Program, int, dict[str, float]]]:
        """An engine that answers, with its first figures."""
        port, before = free_port(), used_bytes()
        command = [*VLLM, "serve", str(self.model), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096"]
        command += ["--kv-cache-memory-bytes", str(KV_BYTES), "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching", *options]
        with running(name, command, self.logs / f"{name}.log", self.environment) as engine:
            ready = wait_until_healthy(engine, port)
            loading = re.search(r"Model loading took ([0-9.]+) GiB(?: memory)? and ([0-9.]+) seconds", engine.log.read_text(errors="replace"))
            figures = {
                "ready_s": ready,
                "loading_took_s": float(loading.group(2)) if loading else float("nan"),
                "memory_without_kv_gib": (used_bytes() - before - KV_BYTES) / GIB,
            }
            print(f"{name}: {json.dumps(figures)}", flush=True)
            yield engine, port, figures

    def throughput(self, port: int) -> float:
        """Generated tokens per second with all requests at once; the median of the rounds after a first one that is not counted."""
        words = SHAPES[self.shape]["vocab_size"]

        def one(number: int) -> int:
            prompt = " ".join(f"w{3 + (number * 7919 + place * 104729) % (words - 3)}" for place in range(PROMPT_TOKENS))
            return len(complete(port, str(self.model), prompt, NEW_TOKENS))

        rates = []
        with ThreadPoolExecutor(self.requests) as pool:
            for _ in range(self.rounds + 1):
                started = time.perf_counter()
                count = sum(pool.map(one, range(self.requests)))
                rates.append(count / (time.perf_counter() - started))
        print(f"  tokens per second: {', '.join(f'{rate:.0f}' for rate in rates)} (the first round is not counted)", flush=True)
        return statistics.median(rates[1:])

    def answers(self, port: int) -> list[list[str]]:
        """Greedy answers to some prompts."""
        return [complete(port, str(self.model), f"w{3 + number} w14 w15 w92", 32) for number in range(8)]


def measure(bench: Bench) -> dict[str, object]:
    """Run the engines; returns the figures."""
    with bench.engine("stock") as (_, port, stock):
        right, stock["tokens_per_s"] = bench.answers(port), bench.throughput(port)
    with (
        serving(bench.runtime, bench.logs / "gms.log", bench.environment) as ready,
        bench.engine("writer", "--load-format", "gms") as (first, port_1, writer),
    ):
        published = first.figures("event=published")
        writer["tokens_per_s"] = bench.throughput(port_1)
        equal = bench.answers(port_1) == right
        with bench.engine("reader", "--load-format", "gms") as (second, port_2, reader):
            attached = second.figures("event=attached")
            equal = equal and bench.answers(port_2) == right
            reader["tokens_per_s"] = bench.throughput(port_2)
    return {
        "shape": bench.shape,
        "tokens_equal": equal,
        "server_ready_s": ready,
        "stock": stock,
        "writer": writer | {key: published[key] for key in ("seconds", "bytes")},
        "reader": reader | {key: attached[key] for key in ("seconds", "bytes", "checkpoint_bytes")},
        "throughput_ratio_reader": reader["tokens_per_s"] / stock["tokens_per_s"],
        "throughput_ratio_writer": writer["tokens_per_s"] / stock["tokens_per_s"],
    }


def main() -> int:
    """Write a model, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--requests", type=int, default=64, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all requests (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/share_weights.json"))
    parser.add_argument("--logs", type=Path, help="keep the programs' logs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gms-bench-") as name:
        directory = Path(name)
        bench = Bench(directory, options.shape, options.requests, options.rounds)
        write_model(bench.model, options.shape, "bfloat16")
        try:
            with kept_logs(bench.logs, options.logs, options.shape):
                figures = measure(bench)
        except ProgramError as failure:
            print(f"The benchmark failed: {failure}", file=sys.stderr)
            return 1
    tell(figures, options.out)
    return 0 if figures["tokens_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
