"""Engines in processes of one rank each, or of a few, that tests start and ask by lines of `vllm_engine`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from failover_story import ENVIRONMENT as OF_ENGINES
from failover_story import without_named_memory
from zygote import Forked, Zygote

RUNNER = Path(__file__).with_name("vllm_engine.py")
ENVIRONMENT = {**OF_ENGINES, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Engine:
    """A process with one engine."""

    process: subprocess.Popen[str] | Forked
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

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> dict[str, Any]:
        self.tell(line)
        return self.answer()

    def again(self) -> dict[str, Any]:
        return self.ask("again")

    def end(self) -> int:
        self.process.communicate("end\n", timeout=60)
        return self.process.returncode


@dataclass
class Site:
    """Where engines find a server and keep their caches.

    Attributes:
        runtime_dir: Of the server.
        folder: Of one test.
        zygote: Forks the engines that have no environment of their own; without it all are processes of their own from the first import on.
    """

    runtime_dir: Path
    folder: Path
    zygote: Zygote | None = None

    @contextlib.contextmanager
    def engine(
        self,
        model: Path,
        load_format: str = "gms",
        *,
        rest: Mapping[str, Any] = NOTHING,
        arguments: Mapping[str, Any] = NOTHING,
        environment: Mapping[str, str] = NOTHING,
        **gms: Any,
    ) -> Iterator[Engine]:
        """Start an engine; it ends with the context.

        Args:
            model: Its folder.
            load_format: ``auto`` for stock vLLM.
            rest: Options for the inner loader.
            arguments: Further arguments of the engine.
            environment: Further variables.
            gms: The block for GMS.
        """
        options = {**rest, **({"gms": gms} if load_format == "gms" else {})}
        variables = {
            **os.environ,
            **ENVIRONMENT,
            "GMS_RUNTIME_DIR": str(self.runtime_dir),
            "GMS_CACHE_DIR": str(self.folder / "cache"),
            **environment,
        }
        log = self.folder / f"engine-{len(list(self.folder.glob('engine-*')))}.log"
        words = [str(model), load_format, json.dumps(options), json.dumps(dict(arguments))]
        process: subprocess.Popen[str] | Forked
        with log.open("w") as errors:
            if self.zygote is not None and not environment:
                process = self.zygote.fork(words, variables, errors)
            else:
                process = subprocess.Popen(
                    [sys.executable, str(RUNNER), *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=variables,
                    start_new_session=True,
                )
        engine = Engine(process, log)
        try:
            yield engine
        finally:
            # An engine with several ranks has processes that outlive the first one.
            with without_named_memory(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def run(self, model: Path, load_format: str = "gms", **options: Any) -> dict[str, Any]:
        """Start an engine, take its first answer and let it end."""
        with self.engine(model, load_format, **options) as engine:
            answer = engine.answer()
            engine.end()
            return answer

    def run_together(self, *starts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Start engines at the same time, which takes half as long, take the first answer of each and let them end.

        Args:
            starts: Arguments of `engine`.
        """
        with contextlib.ExitStack() as stack:
            engines = [stack.enter_context(self.engine(**start)) for start in starts]
            answers = [engine.answer() for engine in engines]
            for engine in engines:
                engine.end()
        return answers


def stock(model: Path, **options: Any) -> dict[str, Any]:
    """How to start a stock engine."""
    return {"model": model, "load_format": "auto", **options}


def two_ranks() -> dict[str, Any]:
    """Options of an engine with two processes that compute together."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    return {
        "arguments": {"tensor_parallel_size": 2},
        "environment": {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        },
    }
