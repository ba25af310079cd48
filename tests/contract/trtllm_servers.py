"""Servers of the double of TensorRT-LLM that fail over: processes with two ranks each, at one port."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trtllm_engines import TOKENS

from tests.conftest import RunningServer
from tests.trtllm_double import ROOT
from tests.unit.publishing import until

PATIENCE_S = 120
PATHS = ":".join([str(ROOT), *filter(None, sys.path)])


class Engine:
    """One server, in a session of its own."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path, server: RunningServer, port: int) -> None:
        self.name, self._log, self._server = name, log, server
        self.runtime_dir, self.port = server.directory, port
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    @property
    def cohort(self) -> Any:
        """What the server knows of it; None if it does not."""
        with self._server.connect() as session:
            return next((cohort for cohort in session.status().cohorts if cohort.engine == self.name), None)

    def becomes(self, role: str) -> None:
        def has_role() -> bool:
            assert self.process.poll() is None, self.log
            return getattr(self.cohort, "role", None) == role

        until(has_role, patience_s=PATIENCE_S)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def pid(self, process: str) -> int:
        return next(member.pid for member in self.cohort.members if member.process == process)

    def members(self, kind: str) -> list[int]:
        """The processes of a kind that have joined."""
        return [member.pid for member in getattr(self.cohort, "members", ()) if member.process.startswith(kind)]

    def is_gone(self) -> bool:
        return self.process.poll() is not None and self.cohort is None

    def ends_in_order(self, number: signal.Signals) -> bool:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S) == 0 and "fenced" not in self.log

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Engine]


def asked(engine: Engine, path: str, body: Any = None) -> Any:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)) as connection:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        return json.loads(connection.getresponse().read())
    return None


@contextlib.contextmanager
def streamed(engine: Engine, pieces: int) -> Iterator[Iterator[bytes]]:
    """An answer that has begun, and comes in so many pieces, ten a second."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps({"prompt": TOKENS, "pieces": pieces}))
        yield iter(connection.getresponse())


def answer(engine: Engine) -> Any:
    """What it says, as soon as it can be reached."""
    said: list[Any] = []
    until(lambda: said.append(asked(engine, "/v1/completions", {"prompt": TOKENS})) or said[-1] is not None, patience_s=PATIENCE_S)
    return said[-1]["choices"]
