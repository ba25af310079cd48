"""The load of ``gms bench failover``, in a process of its own so that it does not disturb whoever measures: requests that are always in flight.

    python -m gms_core.cli.failover_benchmark_load

It is told what to do, and answers, in lines of JSON: first its `Task`, then ``"begin"``, and after the kill its time on the monotonic clock. A client
whose request has failed sends no other one: what is counted is what a kill has cost.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TypeVar

import msgspec

from gms_core.cli.failover_benchmark_client import Endpoint, prompt, stream
from gms_core.cli.failover_benchmark_result import Requests
from gms_core.errors import EngineFailed, GmsError

Heard = TypeVar("Heard", bound=msgspec.Struct)

FLOW_S = 120.0
"""Seconds until each client has a first token, and until the last request has ended after a kill."""
FIRST_NUMBER = 1000
"""Of the prompts: others are for what is compared."""


class Task(msgspec.Struct, frozen=True):
    """What to ask of whom.

    Attributes:
        clients: Each has one request in flight.
    """

    host: str
    port: int
    model: str
    clients: int
    prompt_tokens: int
    new_tokens: int
    seed: int


class Flowing(msgspec.Struct, frozen=True):
    """The answer to ``begin``.

    Attributes:
        problem: Why requests do not flow; empty if each client has got a token.
    """

    problem: str = ""


@dataclass(slots=True)
class _Request:
    sent_s: float
    ended_s: float = float("inf")
    failed: bool = False


class _Clients:
    """Several clients, each in a thread, until a kill."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._requests: list[_Request] = []
        self._stopping = threading.Event()
        self._settled = [threading.Event() for _ in range(task.clients)]
        self._problem = ""
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(task.clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        task = self._task
        words = prompt(task.seed, FIRST_NUMBER + number, task.prompt_tokens)
        while not self._stopping.is_set():
            request = _Request(time.monotonic())
            self._requests.append(request)
            answer = stream(Endpoint(task.host, task.port), task.model, words, task.new_tokens, self._settled[number].set)
            request.ended_s = time.monotonic()
            if answer.outcome != "answered":
                request.failed = True
                self._problem = self._problem or f"a request was {answer.outcome}: {answer.detail}"
                self._settled[number].set()
                return

    def flow(self) -> Flowing:
        """Wait until each client has got a token, or has failed."""
        deadline = time.monotonic() + FLOW_S
        if not all(settled.wait(max(0.0, deadline - time.monotonic())) for settled in self._settled):
            return Flowing(f"not every client has got a token within {FLOW_S:g} s")
        return Flowing(self._problem)

    def end(self, killed_s: float) -> Requests:
        """Send no more requests, wait for those that run, and count."""
        self._stopping.set()
        deadline = time.monotonic() + FLOW_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        before = [request for request in self._requests if request.sent_s < killed_s < request.ended_s]
        after = [request for request in self._requests if request.sent_s >= killed_s]
        unanswered = [request for request in before if request.failed or request.ended_s == float("inf")]
        return Requests(in_flight=len(before), in_flight_failed=len(unanswered), broken=sum(request.failed for request in after))


def serve(lines: IO[bytes], answers: IO[bytes]) -> None:
    """Do what the lines say, until there are no more."""
    task = msgspec.json.decode(lines.readline(), type=Task)
    clients: _Clients | None = None
    for line in lines:
        command = msgspec.json.decode(line, type=str | float)
        if isinstance(command, str):
            clients = _Clients(task)
            answer: Flowing | Requests = clients.flow()
        else:
            answer = clients.end(command) if clients is not None else Requests()
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()


class Load:
    """The process, as the benchmark sees it."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes], task: Task) -> None:
        self._requests, self._answers = requests, answers
        self._say(task)

    def begin(self) -> None:
        """Returns once every client has a request in flight.

        Raises:
            EngineFailed: A request has failed.
        """
        self._say("begin")
        problem = self._hear(Flowing).problem
        if problem:
            raise EngineFailed(f"requests do not flow: {problem}", hint="Do --prompt-tokens and --new-tokens fit into the engine's context?")

    def end(self, killed_s: float) -> Requests:
        """What has become of the requests; there are none any more.

        Args:
            killed_s: When the engine was killed, on the monotonic clock.
        """
        self._say(killed_s)
        return self._hear(Requests)

    def _say(self, what: object) -> None:
        self._requests.write(msgspec.json.encode(what) + b"\n")
        self._requests.flush()

    def _hear(self, kind: type[Heard]) -> Heard:
        line = self._answers.readline()
        if not line:
            raise GmsError("the process that sends requests has ended")
        return msgspec.json.decode(line, type=kind)


@contextmanager
def load(task: Task) -> Iterator[Load]:
    """The load, in a process of its own, for as long as the context lasts."""
    command = [sys.executable, "-P", "-m", "gms_core.cli.failover_benchmark_load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            yield Load(process.stdin, process.stdout, task)
        finally:
            process.kill()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
