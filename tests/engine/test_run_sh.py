"""The example without a supervisor, as a user runs it: a primary and a shadow as plain processes, a kill, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from chaos.warden import Warden
from failover_story import ENVIRONMENT, KV_BYTES, OPTIONS, PATIENCE_S, Client, until

from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parents[2] / "examples" / "shadow_failover" / "run.sh"
CALLER = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.stdin.read()"


class Script:
    """The running script, in the process group of somebody who lives through Ctrl-C, as a caller's shell does."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.caller = subprocess.Popen([sys.executable, "-c", CALLER], stdin=subprocess.PIPE, process_group=0)
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            process_group=self.caller.pid,
        )
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("")

    def until_it_says(self, pattern: str) -> re.Match[str]:
        """The first further line that has this in it."""
        while True:
            line = self._lines.get(timeout=PATIENCE_S)
            self.said.append(line)
            if found := re.search(pattern, line):
                return found
            assert self.process.poll() is None or self._reader.is_alive() or not self._lines.empty(), self.said

    def interrupt(self) -> None:
        """What Ctrl-C is: a signal to everybody in the group."""
        os.killpg(self.caller.pid, signal.SIGINT)

    def close(self) -> None:
        """End whatever is left of it, with the caller."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.caller.pid, signal.SIGKILL)
        self.process.wait()
        self.caller.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.caller.stdin):
            assert stream is not None
            stream.close()


def test_shadow_serves_and_nothing_is_left_when_the_example_is_run_and_its_primary_is_killed(
    warden: Warden, runtime_dir: Path, tmp_path: Path, failover_model: Path, stock_answers: list[list[str]]
) -> None:
    port = free_port()
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GMS_RUNTIME_DIR": str(runtime_dir),
        "GMS_CACHE_DIR": str(tmp_path / "cache"),
        "LOGS": str(tmp_path),
        "DEVICE": "host",
    }
    options = [*OPTIONS, "--kv-cache-memory-bytes", str(KV_BYTES), "--host", "127.0.0.1"]
    client = Client(failover_model, port)
    script = Script([str(failover_model), str(port), "--", *options], environment)
    try:
        primary = int(script.until_it_says(r"engine-0 is primary \(process group (\d+)\)")[1])
        warden.watch(primary)
        warden.watch(int(script.until_it_says(r"engine-1 is standby \(process group (\d+)\)")[1]))
        assert client.tokens() == stock_answers[0]
        script.until_it_says("engines: engine-0 primary, engine-1 standby$")
        os.killpg(primary, signal.SIGKILL)
        script.until_it_says("engines: engine-1 primary$")
        assert client.tokens() == stock_answers[0]
        assert client.request("GET", "/gms/status")[1]["engine"] == "engine-1"
        script.interrupt()
        assert script.process.wait(PATIENCE_S) == 0
        until(lambda: set(warden.left()) <= {script.caller.pid}, "processes that the script has started are left")
        assert script.caller.poll() is None
        assert [path for path in runtime_dir.iterdir() if path.suffix == ".sock"] == []
    finally:
        script.close()
