"""Engines that stand in for one another, as real `vllm serve` processes on CPU: started, watched by what the server says of them, and killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gms_core.client import Session
from gms_core.fleet.engines import Engine, engines
from gms_core.protocol.messages import Instruct, Order, Role, StatusReport

PROMPT = [5, 17, 33, 101, 7]
TOKENS = 24
PATIENCE_S = 240.0
"""Seconds for whatever has to happen: an engine's start on a busy machine is the longest."""

STARTUP = Path(__file__).with_name("startup")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(STARTUP), os.environ.get("PYTHONPATH")))),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_PLUGINS": "gms",
    "TOKENIZERS_PARALLELISM": "false",
}
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4", "--seed", "0")
KV_BYTES = 24 * 2**20
"""Blocks of it are not as many as a block has tokens: which dimension of a tensor counts them is certain then, and there can be a bridge."""


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The first true value of a condition.

    Raises:
        AssertionError: It never had one.
    """
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
    return value


def living(session: int) -> list[int]:
    """Processes of a session that have not exited."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state not in "ZX":
                    found.append(int(entry.name))
    return found


def named_memory(session: int) -> set[str]:
    """Names of shared memory that the processes of a session have mapped."""
    found = set()
    for pid in living(session):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    return found


@contextlib.contextmanager
def without_named_memory(session: int) -> Iterator[None]:
    """Kill a session's processes in the context: stock vLLM then leaves names of shared memory, which go here."""
    names = named_memory(session)
    yield
    for name in names:
        Path("/dev/shm", name).unlink(missing_ok=True)


@dataclass
class Running:
    """One engine, in a session of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def pids(self) -> list[int]:
        """All living processes that the engine has started, and its first one."""
        return living(self.process.pid)

    def named_memory(self) -> set[str]:
        """Names of shared memory that its processes have mapped; each must be gone soon after the engine."""
        return named_memory(self.process.pid)

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def until_gone(self) -> None:
        """Wait until nothing of it is left."""
        until(lambda: self.process.poll() is not None and not self.pids(), f"processes of {self.name} are left: {self.pids()}")

    def timeline(self) -> dict[str, str]:
        """The pairs of the log line of its promotion."""
        for line in self.log.read_text(errors="replace").splitlines():
            if "event=promoted" in line:
                return dict(pair.split("=", 1) for pair in line.rpartition("[gms ")[2].rstrip("]").split() if "=" in pair)
        raise AssertionError(f"{self.name} was never promoted:\n{self.tail()}")


@dataclass
class Story:
    """A device server, and engines that are each other's shadows.

    Attributes:
        server: Of `tests.conftest.running_server`.
        model: Its folder.
        folder: For logs and caches.
        lock: What elects the primary.
    """

    server: Any
    model: Path
    folder: Path
    lock: str = "gms:primary"
    _count: int = 0

    @property
    def command(self) -> Sequence[str]:
        """What starts an engine, but for what is said of it here."""
        program = str(Path(sys.executable).with_name("vllm"))
        return (program, "serve", str(self.model), *OPTIONS, "--kv-cache-memory-bytes", str(KV_BYTES))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names with which an engine's processes join their cohort."""
        return ("api-server 0", "engine-core", "rank 0")

    @property
    def kv_bytes(self) -> int:
        """What an engine's KV memory has at least."""
        return KV_BYTES

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of every engine."""
        return ENVIRONMENT

    def ended_in_order(self, engine: Running) -> bool:
        """Whether an engine that is gone has ended after its work, and of itself."""
        return bool(engine.process.returncode == 0)

    @contextlib.contextmanager
    def engine(
        self,
        name: str,
        *options: str,
        failover: Mapping[str, Any] | None = None,
        load_format: str = "gms",
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Running]:
        """Start an engine; whatever is left of it ends with the context.

        Args:
            name: What it is called.
            options: Further ones of the command.
            failover: Further keys of its failover block.
            load_format: ``auto`` for a stock engine.
            environment: Further variables.
        """
        self._count += 1
        log = self.folder / f"{self._count}-{name}.log"
        block = {"failover": {"lock": self.lock, "alias_bytes": 2**20, **(failover or {})}}
        gms = ("--model-loader-extra-config", json.dumps({"gms": block})) if load_format == "gms" else ()
        command = [*self.command, "--load-format", load_format, *gms, "--host", "127.0.0.1", *options]
        variables = {
            **os.environ,
            **self.environment,
            "GMS_RUNTIME_DIR": str(self.server.directory),
            "GMS_CACHE_DIR": str(self.folder / "cache"),
            "GMS_ENGINE": name,
            **(environment or {}),
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        running = Running(name, process, log)
        try:
            yield running
        except AssertionError as error:
            error.add_note(f"the end of {log.name}:\n{running.tail()}")
            raise
        finally:
            with without_named_memory(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(PATIENCE_S)
                running.until_gone()

    def status(self) -> StatusReport:
        """What the server says now."""
        session: Session
        with self.server.connect("story") as session:
            return session.status()

    def seen(self, running: Running) -> Engine | None:
        """What the server says of an engine."""
        return next((engine for engine in engines([self.status()]) if engine.name == running.name), None)

    def until_role(self, running: Running, role: Role) -> Engine:
        """Wait until an engine has a role."""

        def has_role() -> Engine | None:
            assert running.process.poll() is None, f"{running.name} ended with {running.process.returncode}"
            engine = self.seen(running)
            return engine if engine is not None and engine.standing == role else None

        found: Engine = until(has_role, f"{running.name} is not {role}: {self.seen(running)}")
        return found

    def primaries(self) -> list[str]:
        """Names of the engines that serve."""
        return [engine.name for engine in engines([self.status()]) if engine.standing == "primary"]

    def processes(self, running: Running) -> list[str]:
        """Names of an engine's processes, as the server knows them."""
        engine = self.seen(running)
        return [] if engine is None else sorted({member.process.split(" (")[0] for member in engine.members})

    def order(self, running: Running, order: Order) -> None:
        """Tell an engine what an operator wants of it."""
        engine = self.seen(running)
        assert engine is not None
        with self.server.connect("operator") as session:
            session.perform(Instruct(engine.cohort, order))

    def is_next(self, running: Running) -> bool:
        """Whether the lock will go to an engine before all others."""
        engine = self.seen(running)
        return engine is not None and any(lock.waiting[:1] == (engine.cohort,) for lock in self.status().locks)

    def pid_of(self, running: Running, process: str) -> int:
        """The process of an engine that joined its cohort under this name."""
        engine = self.seen(running)
        assert engine is not None
        return next(member.pid for member in engine.members if member.process.split(" (")[0] == process)

    def kill(self, running: Running, process: str) -> float:
        """Kill one process of an engine, or its whole group with ``group``; returns when, on the monotonic clock."""
        if process == "group":
            killed = time.monotonic()
            os.killpg(running.process.pid, signal.SIGKILL)
        else:
            pid = self.pid_of(running, process)
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
        return killed


@dataclass(frozen=True)
class Client:
    """Somebody who wants tokens from one address.

    Attributes:
        model: As the engines call it.
        port: Of the loopback interface; 0 if ``path`` is a Unix socket.
    """

    model: Path
    port: int = 0
    path: Path | None = None

    def request(self, method: str, where: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of one request, over a connection of its own.

        Raises:
            OSError, http.client.HTTPException: Nobody answered.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            if self.path is not None:
                connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.sock.settimeout(PATIENCE_S)
                connection.sock.connect(str(self.path))
            connection.request(method, where, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text

    def tokens(self, count: int = TOKENS) -> list[str]:
        """The tokens with which the engine continues the usual prompt; see `continuation`."""
        return self.continuation(PROMPT, count)

    def continuation(self, prompt: Sequence[int], count: int = TOKENS) -> list[str]:
        """The tokens with which the engine continues a prompt, greedily.

        Raises:
            OSError, http.client.HTTPException: Nobody answered.
            AssertionError: It was no answer.
        """
        body = {"model": str(self.model), "prompt": list(prompt), "max_tokens": count, "temperature": 0, "ignore_eos": True}
        status, answer = self.request("POST", "/v1/completions", body)
        assert status == 200, (status, answer)
        return str(answer["choices"][0]["text"]).split()

    def first_token_after(self, killed: float) -> float:
        """Seconds from an instant to the first token that somebody answered with, asking again and again."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                self.tokens(1)
            except (OSError, http.client.HTTPException, AssertionError):
                time.sleep(0.002)
            else:
                return time.monotonic() - killed
        raise AssertionError("nobody serves")

    def listens(self) -> bool:
        """Whether a connection can be made."""
        try:
            self.request("GET", "/gms/status")
        except (OSError, http.client.HTTPException):
            return False
        return True
