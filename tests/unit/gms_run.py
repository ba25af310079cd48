"""`gms run` as a real process, with fake engines that are real processes too."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gms_core.config import child_environment

GMS = [sys.executable, "-m", "gms_core.cli"]
ENGINE = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
PATIENCE_S = 60.0

Event = dict[str, Any]


class GmsRun:
    """A ``gms run -o json``, and what it has told."""

    def __init__(self, directory: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        command = [*GMS, "run", "--runtime-dir", str(directory), "-o", "json", *arguments]
        # In a session of its own: like every user's, and Ctrl-C reaches nobody else.
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(**{"GMS_PLUGINS": "", **environment}),
            start_new_session=True,
        )
        self.events: list[Event] = []
        self._incoming: queue.Queue[Event | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._incoming.put(json.loads(line))
        self._incoming.put(None)

    def wait_for(self, subject: str, state: str, condition: Callable[[Event], bool] = lambda _: True) -> Event:
        """The next event, from the last one that was looked at, that says so."""
        while True:
            event = self._incoming.get(timeout=PATIENCE_S)
            assert event is not None, f"it has ended before {subject} was {state}: {self.events} {self.stderr()}"
            self.events.append(event)
            if (event["subject"], event["state"]) == (subject, state) and condition(event):
                return event

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Wait for its end; returns the exit code, and takes in the last events."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        while (event := self._incoming.get_nowait()) is not None:
            self.events.append(event)
        return code

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def told(self, subject: str) -> list[str]:
        """The states that were told of a subject, in order, each once in a row."""
        states = [event["state"] for event in self.events if event["subject"] == subject]
        return [state for index, state in enumerate(states) if index == 0 or states[index - 1] != state]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def gms_run(directory: Path, *arguments: str, **environment: str) -> Iterator[GmsRun]:
    """A ``gms run`` until the context ends, and then nothing of it is left, whatever happened."""
    run = GmsRun(directory, arguments, environment)
    try:
        yield run
        assert run.process.poll() is not None, "the test has ended it"
    finally:
        run.close()
        left = processes_of(directory)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert left == [] or run.process.returncode == -signal.SIGKILL, "processes are left"


def processes_of(directory: Path) -> list[int]:
    """Processes that were started for this runtime directory by `gms run`, known by their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"GMS_RUNTIME_DIR={directory}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def answer(port: int) -> list[str]:
    """Name, process and epoch of the engine that serves."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection, connection.makefile() as file:
        return file.readline().split()
