"""How long an engine takes to fall asleep and to wake up, by GMS and by vLLM's own sleep mode, and what memory it gives back meanwhile.

    python examples/share_weights/sleep.py 8b --kv-gib 60

Options that it does not know itself go to vllm serve, such as --enforce-eager.

On a machine without a GPU only GMS is measured: vLLM's own sleep mode needs one.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from model import SHAPES
from processes import (
    GIB,
    ProgramError,
    complete,
    environment,
    free_port,
    kept_logs,
    program,
    running,
    serving,
    tell,
    used_gib,
    wait_until_healthy,
    write_model,
)

VLLM = program("vllm")
LEVELS = (1, 2)


def post(port: int, path: str) -> float:
    """Ask an engine for something; returns the milliseconds until it has answered."""
    started = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", method="POST"), timeout=600):
        return (time.perf_counter() - started) * 1000


class Bench:
    """The programs under test, on one model."""

    def __init__(self, directory: Path, shape: str, kv_bytes: int, rounds: int, options: list[str]) -> None:
        self.model = directory / "model"
        self.runtime = directory / "run"
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.kv_bytes, self.rounds, self.options = kv_bytes, rounds, options
        self.environment = environment(self.runtime, directory / "cache") | {"VLLM_SERVER_DEV_MODE": "1"}
        write_model(shape, self.model)

    @contextlib.contextmanager
    def engine(self, name: str, *options: str) -> Iterator[int]:
        """An engine that answers on the port that is given."""
        port = free_port()
        command = [*VLLM, "serve", str(self.model), "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096", "--enable-sleep-mode"]
        command += ["--kv-cache-memory-bytes", str(self.kv_bytes), "--gpu-memory-utilization", "0.9", *self.options, *options]
        with running(name, command, self.logs / f"{name}.log", self.environment) as engine:
            wait_until_healthy(engine, port)
            yield port

    def answers(self, port: int) -> list[list[str]]:
        """Greedy answers to some prompts."""
        return [complete(port, str(self.model), f"w{3 + number} w14 w15 w92", 32) for number in range(4)]

    def cycles(self, port: int, levels: tuple[int, ...]) -> dict[str, object]:
        """Let an engine sleep and wake up; the figures are medians, in milliseconds and GiB."""
        right, awake = self.answers(port), used_gib()
        figures: dict[str, object] = {"awake_gib": awake}
        equal = True
        for level in levels:
            sleeps, wakes, asleep = [], [], awake
            for _ in range(self.rounds):
                sleeps.append(post(port, f"/sleep?level={level}"))
                asleep = used_gib()
                wakes.append(post(port, "/wake_up"))
                equal = equal and self.answers(port) == right
            figures[f"level_{level}"] = {"sleep_ms": statistics.median(sleeps), "wake_ms": statistics.median(wakes), "asleep_gib": asleep}
        return figures | {"tokens_equal": equal}


def measure(bench: Bench) -> dict[str, object]:
    """Run the engines; returns the figures."""
    figures: dict[str, object] = {}
    if used_gib() is not None:
        with bench.engine("stock") as port:
            figures["stock"] = bench.cycles(port, (1,))  # at level 2 its weights are gone
    device = ["--device", "host"] if used_gib() is None else []
    with serving(bench.runtime, bench.logs / "gms.log", bench.environment, *device), bench.engine("gms", "--load-format", "gms") as port:
        figures["gms"] = bench.cycles(port, LEVELS)
    return figures


def main() -> int:
    """Write a model, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--kv-gib", type=float, default=60.0, help="memory of the KV cache (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times to sleep and wake up at each level (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures here too")
    parser.add_argument("--logs", type=Path, help="keep the programs' logs here")
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="gms-bench-") as name:
        bench = Bench(Path(name), options.shape, int(options.kv_gib * GIB), options.rounds, others)
        try:
            with kept_logs(bench.logs, options.logs, f"sleep-{options.shape}"):
                figures = {"shape": options.shape, "kv_gib": options.kv_gib, **measure(bench)}
        except ProgramError as failure:
            print(f"The benchmark failed: {failure}", file=sys.stderr)
            return 1
    tell(figures, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
