"""Real SGLang servers on CPU, as `python -m sglang.launch_server` starts them, in the environment of SGLang: vLLM cannot share one with it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from failover_story import living, until, without_named_memory
from packaging.version import Version
from ports import free_port

PYTHON = Path(os.environ.get("GMS_TEST_SGLANG_PYTHON", Path(__file__).parents[2] / "build/sglang-cpu/bin/python"))
"""Of an environment that `tools/cpu_sglang.sh` has made."""
OPTIONS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--context-length", "128"),
    *("--mem-fraction-static", "0.2", "--max-total-tokens", "4096"),
    *("--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RENDEZVOUS = "--nccl-port"
"""Where an engine's ranks meet. SGLang would look for a port of the kernel's, and take it seconds later, when somebody else may have it."""
MEMORY = r"memfd:gms-\d"
"""In the name of a memory file of the driver."""
PROGRAM = Path(__file__).with_name("sglang_engine.py")
PROMPTS = [[5, 17, 33, 101, 7], [11, 12, 13], [400, 3, 250, 77, 8, 9, 10, 44]]
TOKENS = 24
NOTHING: Mapping[str, str] = MappingProxyType({})


@functools.cache
def version() -> Version:
    """Which SGLang the tests run."""
    found = subprocess.run([PYTHON, "-c", "import importlib.metadata as m; print(m.version('sglang'))"], capture_output=True, text=True, check=True)
    return Version(found.stdout.strip())


@dataclass
class Server:
    """One engine, in a session of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """The status and the answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def wait(self) -> None:
        """Wait until it listens."""

        def listens() -> bool:
            assert self.process.poll() is None, self.tail()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/model_info", timeout=60):
                return True
            return False

        until(listens, f"the engine listens:\n{self.tail()}")

    def tokens(self) -> list[list[int]]:
        """What it says to some prompts, greedily."""
        sampling = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        status, answers = self.post("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
        assert status == 200, answers
        return [answer["output_ids"] for answer in answers]

    def refusal(self) -> str:
        """Its log, once it has ended by itself."""
        assert self.process.wait(240) != 0
        return self.log.read_text()

    def figures(self) -> dict[str, str]:
        """What its log says of the load."""
        (line,) = re.findall(r"\[gms (event=.*)\]", self.log.read_text())
        return dict(pair.split("=", 1) for pair in line.split())

    def mapped(self) -> dict[str, list[str]]:
        """Rights with which its processes have mapped memory of a driver, by the file's inode."""
        found: dict[str, list[str]] = {}
        for pid in living(self.process.pid):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if re.search(MEMORY, line):
                    _, rights, _, _, inode = line.split()[:5]
                    found.setdefault(inode, []).append(rights)
        return found

    def share(self, inodes: Collection[str]) -> int:
        """Bytes of its processes' shares in these files."""
        total, counted = 0, False
        for pid in living(self.process.pid):
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                if "-" in line.split(" ", 1)[0]:
                    counted = re.search(MEMORY, line) is not None and line.split()[4] in inodes
                elif counted and line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def memory(self) -> tuple[int, int]:
        """Bytes of memory files that its processes have mapped, and that they keep through mappings or descriptors."""
        return memory_of(self.process.pid)

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-60:])


@dataclass
class Program:
    """One engine in a program, in a session of its own."""

    process: subprocess.Popen[str]
    log: Path

    def answer(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine ended without an answer:\n{self.log.read_text()[-6000:]}"
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, what: str, *arguments: Any, **keywords: Any) -> Any:
        """What it answers; for an error its code and its message."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, *arguments, keywords] if keywords else [what, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        return answer["answer"] if "answer" in answer else (answer["error"], answer["message"])

    def refusal(self) -> str:
        """Its log, once it has ended by itself."""
        assert self.process.wait(240) != 0
        return self.log.read_text()

    def memory(self) -> tuple[int, int]:
        """As `Server.memory`."""
        return memory_of(self.process.pid)

    def kill(self) -> None:
        """End all of its processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)


def memory_of(session: int) -> tuple[int, int]:
    """Bytes of a driver's memory that a session's processes have mapped, and that they keep through mappings or descriptors."""
    mapped, kept = 0, {}
    for pid in living(session):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if re.search(MEMORY, line):
                    start, end = (int(address, 16) for address in line.split(" ", 1)[0].split("-"))
                    mapped += end - start
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if re.search(MEMORY, os.readlink(descriptor)):
                        kept[descriptor.stat().st_ino] = descriptor.stat().st_size
    return mapped, sum(kept.values())


@dataclass
class Site:
    """Where engines find a server and keep their caches.

    Attributes:
        runtime_dir: Of the server.
        folder: Of one test.
    """

    runtime_dir: Path
    folder: Path

    def environment(self, changes: Mapping[str, str] = NOTHING) -> dict[str, str]:
        assert PYTHON.exists(), f"{PYTHON} is missing: run `make sglang-environment`"
        places = {"GMS_RUNTIME_DIR": str(self.runtime_dir), "GMS_CACHE_DIR": str(self.folder / "cache")}
        return {**os.environ, **ENVIRONMENT, **places, **changes}

    @contextlib.contextmanager
    def serve(
        self, model: Path, load_format: str = "gms", *options: str, environment: Mapping[str, str] = NOTHING, rest: Any = None, **gms: Any
    ) -> Iterator[Server]:
        """Start an engine; it ends with the context.

        Args:
            model: Its folder.
            load_format: ``auto`` for stock SGLang.
            options: Further options of the command line.
            environment: Further variables.
            rest: Options for the inner loader.
            gms: The block for GMS.
        """
        port = free_port()
        extra = {**(rest or {}), **({"gms": gms} if gms else {})}
        more = ["--model-loader-extra-config", json.dumps(extra)] if extra else []
        command = [str(PYTHON), "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), "--load-format", load_format]
        log = self._log()
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *OPTIONS, RENDEZVOUS, str(free_port()), *more, *options],
                stdout=output,
                stderr=output,
                env=self.environment(environment),
                start_new_session=True,
            )
        with _ending(process):
            yield Server(process, port, log)

    @contextlib.contextmanager
    def program(
        self, model: Path, gms: Mapping[str, Any] | None = NOTHING, environment: Mapping[str, str] = NOTHING, **options: Any
    ) -> Iterator[Program]:
        """Start an engine in a program; it ends with the context.

        Args:
            model: Its folder.
            gms: The block for GMS; None for stock SGLang.
            environment: Further variables.
            options: Further arguments of ``sglang.Engine``.
        """
        log = self._log()
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    str(PYTHON),
                    str(PROGRAM),
                    str(model),
                    json.dumps(gms if gms is None else dict(gms)),
                    json.dumps({"nccl_port": free_port(), **options}),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=self.environment(environment),
                start_new_session=True,
            )
        with _ending(process):
            yield Program(process, log)

    def _log(self) -> Path:
        return self.folder / f"engine-{len(list(self.folder.glob('engine-*')))}.log"

    def ask(self, script: Path, *arguments: str) -> Any:
        """Run a script in SGLang's environment, and take the JSON that it prints last."""
        found = subprocess.run(
            [str(PYTHON), str(script), *arguments], env=self.environment(), stdout=subprocess.PIPE, text=True, check=True, timeout=240
        )
        return json.loads(found.stdout.splitlines()[-1])


@contextlib.contextmanager
def _ending(process: subprocess.Popen[Any]) -> Iterator[None]:
    """End a process with its session, and wait until nothing of it is left."""
    try:
        yield
    finally:
        with without_named_memory(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            deadline = time.monotonic() + 30
            while living(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.02)


def ready(*servers: Server) -> Sequence[list[list[int]]]:
    """Wait for engines that start together, and take what each says."""
    for server in servers:
        server.wait()
    return [server.tokens() for server in servers]
