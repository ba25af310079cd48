"""Start the real programs, wait until they are ready, and end them with everything that they started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


class ProgramError(Exception):
    """A program ended or hung; the message has the end of its log."""


@dataclass
class Program:
    """A running program in a process group of its own, with its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def check(self) -> None:
        """Raise if the program has ended."""
        if self.process.poll() is not None:
            raise ProgramError(f"{self.name} exited with code {self.process.returncode}; the end of {self.log}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def figures(self, event: str) -> dict[str, float]:
        """The ``key=number`` pairs of the log line of the adapter that has ``event`` in it."""
        for line in self.log.read_text(errors="replace").splitlines():
            if event in line:
                return {key: float(number) for key, number in re.findall(r"(\w+)=([0-9.]+)\b", line.split(event, 1)[1])}
        raise ProgramError(f"{self.log} has no line with {event!r}:\n{self.tail()}")


@contextlib.contextmanager
def running(name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Program]:
    """Run a program until the context ends; its whole process group ends with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            yield Program(name, process, log, time.monotonic())
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 20.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(engine: Program, port: int, patience_s: float = 600.0) -> float:
    """Wait until ``/health`` answers; returns the seconds since the engine was started."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        engine.check()
        if get(port, "/health")[0] == 200:
            return time.monotonic() - engine.started
        time.sleep(0.2)
    raise ProgramError(f"{engine.name} was not healthy after {patience_s:g} s; the end of its log:\n{engine.tail()}")


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a page; 0 and nothing while nobody answers there."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def complete(port: int, model: str, prompt: str, count: int) -> list[str]:
    """The tokens with which an engine continues a prompt, greedily."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return list(json.load(answer)["choices"][0]["logprobs"]["tokens"])


def used_gib() -> float | None:
    """Memory of the first GPU that is in use, by whomever; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used) / GIB


def environment(runtime: Path, cache: Path) -> dict[str, str]:
    """Variables of engines and servers in directories of their own, that download nothing and tell nobody of themselves."""
    return {
        "GMS_RUNTIME_DIR": str(runtime),
        "GMS_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextlib.contextmanager
def serving(runtime: Path, log: Path, variables: Mapping[str, str], *options: str) -> Iterator[float]:
    """A device server that clients can reach; the seconds until they could."""
    command = [*program("gms"), "serve", *options, "--runtime-dir", str(runtime)]
    with running("gms serve", command, log, variables) as server:
        while not list(runtime.glob("*.sock")):
            server.check()
            time.sleep(0.001)
        yield time.monotonic() - server.started


def write_model(shape: str, directory: Path) -> None:
    """Write a model in a process of its own, which leaves nothing on the device."""
    writer = [sys.executable, str(Path(__file__).with_name("model.py")), shape, str(directory)]
    subprocess.run([*writer, "--dtype", "float32" if used_gib() is None else "bfloat16"], check=True)


@contextlib.contextmanager
def kept_logs(logs: Path, target: Path | None, prefix: str) -> Iterator[None]:
    """Copy all logs when the context ends, however it does; nothing without a target."""
    try:
        yield
    finally:
        if target:
            target.mkdir(parents=True, exist_ok=True)
            for log in logs.rglob("*.log"):
                (target / "-".join([prefix, *log.relative_to(logs).parts])).write_bytes(log.read_bytes())


def tell(figures: Mapping[str, object], out: Path | None) -> None:
    """Print figures, and write them to a file if one is wanted."""
    text = json.dumps(figures, indent=2)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)


def program(name: str) -> list[str]:
    """The command line of ``gms`` or ``vllm`` in this Python's environment; its console scripts may be anywhere, or nowhere."""
    return [sys.executable, "-m", {"gms": "gms_core.cli", "vllm": "vllm.entrypoints.cli.main"}[name]]
