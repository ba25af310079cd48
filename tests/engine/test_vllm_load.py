"""Real vLLM engines on CPU share one copy of the weights: the first publishes, the others attach without the checkpoint, and all say the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import SHAPES, write_model

from gms_core.client import Session, connect
from gms_core.layout import Identity

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

RUNNER = Path(__file__).with_name("vllm_engine.py")
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "gms",
}


@dataclass
class Engine:
    """A process with one engine."""

    process: subprocess.Popen[str]
    log: Path

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; vLLM's log lines go to a file."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"the engine ended without an answer:\n{''.join(lines[-20:])}\n{self.log.read_text()[-4000:]}")

    def again(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> int:
        self.process.communicate("end\n", timeout=60)
        return self.process.returncode


@dataclass
class Site:
    """A server, and where engines find it and keep their caches."""

    runtime_dir: Path
    folder: Path

    @contextlib.contextmanager
    def engine(self, model: Path, load_format: str = "gms", gms: dict[str, Any] | None = None, rest: dict[str, Any] | None = None, **extra: str) -> Iterator[Engine]:
        """Start an engine; it ends with the context."""
        options = {**(rest or {}), **({"gms": gms or {}} if load_format == "gms" else {})}
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "GMS_RUNTIME_DIR": str(self.runtime_dir),
            "GMS_CACHE_DIR": str(self.folder / "cache"),
            "VLLM_CACHE_ROOT": str(self.folder / "vllm"),
            **extra,
        }
        log = self.folder / f"engine-{len(list(self.folder.glob('engine-*')))}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(RUNNER), str(model), load_format, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        engine = Engine(process, log)
        try:
            yield engine
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def run(self, model: Path, load_format: str = "gms", **options: Any) -> dict[str, Any]:
        """Start an engine, take its first answer and let it end."""
        with self.engine(model, load_format, **options) as engine:
            answer = engine.answer()
            engine.end()
            return answer


@pytest.fixture
def site(server: Any, tmp_path: Path) -> Site:
    return Site(server.directory, tmp_path)


def hide_weights(model: Path) -> None:
    hidden = model.parent / "hidden"
    hidden.mkdir()
    for path in model.glob("*.safetensors"):
        shutil.move(path, hidden)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_equal_when_an_engine_attaches_without_the_checkpoint(shape: str, site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shape)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    stock = site.run(model, "auto")
    with site.engine(model) as writer:
        published = writer.answer()
        assert published.get("tokens") == stock["tokens"], published
        assert published["figures"]["event"] == "published"
        assert published["figures"]["checkpoint_bytes"] == size
        hide_weights(model)
        with site.engine(model) as reader:
            attached = reader.answer()
            assert attached.get("tokens") == stock["tokens"], attached
            assert attached["figures"]["event"] == "attached"
            assert attached["figures"]["generation"] == published["figures"]["generation"] == 1
            assert attached["figures"]["bytes"] == published["figures"]["bytes"] >= 0.9 * size
            assert attached["figures"]["checkpoint_bytes"] == 0
            both = [writer.again(), reader.again()]
            assert [answer["tokens"] for answer in both] == [stock["tokens"]] * 2
            assert sum(answer["pss"] for answer in both) <= published["figures"]["bytes"] + 2**20
