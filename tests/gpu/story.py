"""Engines of one model on one port of a real GPU, as tests of failover need them. Needs vLLM beside gms."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples" / "share_weights"
GIB = 2**30
PATIENCE_S = 600.0
UTILIZATION = "0.4"
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
"""Full graphs, and no compilation, which would only take its time."""


class Story:
    """Engines of one model on one port, with the programs of the examples.

    Attributes:
        port: Of all engines.
    """

    def __init__(self, folder: Path, runtime_dir: Path, runner: str, programs: Any, bridge_bytes: int = 0) -> None:
        self._folder, self._runtime_dir, self._programs, self._bridge_bytes = folder, runtime_dir, programs, bridge_bytes
        self.port = programs.free_port()
        self._environment = programs.environment(runtime_dir, folder / "cache") | {"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0"}

    @contextlib.contextmanager
    def server(self) -> Iterator[None]:
        with self._programs.serving(self._runtime_dir, self._folder / "gms.log", self._environment):
            yield

    @contextlib.contextmanager
    def engine(self, name: str, status_port: int = 0) -> Iterator[Any]:
        """An engine that fails over; a stock one without a port for its status."""
        command = [*self._programs.program("vllm"), "serve", str(self._folder / "model"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--max-model-len", "2048", "--gpu-memory-utilization", UTILIZATION, "--compilation-config", json.dumps(GRAPHS)]
        command += ["--no-enable-prefix-caching"]
        if status_port:
            failover = {"lock": "gms:test", "status_address": f"127.0.0.1:{status_port}", "bridge_bytes": self._bridge_bytes}
            command += ["--load-format", "gms", "--model-loader-extra-config", json.dumps({"gms": {"failover": failover}})]
        with self._programs.running(name, command, self._folder / f"{name}.log", self._environment | {"GMS_ENGINE": name}) as engine:
            yield engine

    def until_role(self, engine: Any, status_port: int, role: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            engine.check()
            status, body = self._programs.get(status_port, "/gms/status")
            if status == 200 and json.loads(body)["role"] == role:
                return
            time.sleep(0.05)
        raise AssertionError(f"{engine.name} is not {role}:\n{engine.tail()}")

    def complete(self, prompt: str, count: int) -> list[str]:
        """The tokens with which the engine that serves continues a prompt, greedily."""
        found: list[str] = self._programs.complete(self.port, str(self._folder / "model"), prompt, count)
        return found

    def answers(self) -> list[list[str]]:
        """Greedy answers to short and long prompts, one after the other: in a batch the numbers depend on who else is in it."""
        prompts = [
            " ".join(f"w{3 + (number * 7919 + place * 104729) % 500}" for place in range(length)) for number, length in enumerate((3, 40, 700, 1500))
        ]
        return [self.complete(prompt, 48) for prompt in prompts]


def used_gib() -> float:
    import pynvml

    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used) / GIB
