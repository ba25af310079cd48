"""Servers of TensorRT-LLM that fail over: processes of the double with two ranks each, which are killed, and whose shadow serves at their port."""

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

import pytest
from click.testing import CliRunner
from trtllm_engines import TOKENS, by_the_adapter

from gms_core.cli import gms
from gms_core.config import child_environment
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.trtllm_double import MERGED_FIRST, ROOT, STAGED_HOOKS, WITHOUT_GMS
from tests.unit.gms_run import gms_run
from tests.unit.publishing import until

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 120
STORY = Path(__file__).parents[2] / "examples/trtllm/verify.sh"
PARTS = 15
"""All but the check of what is installed: the double is not."""
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

    def is_gone(self) -> bool:
        return self.process.poll() is not None and self.cohort is None

    def ends_in_order(self, number: signal.Signals) -> bool:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S) == 0 and "fenced" not in self.log

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(variant: str, server: RunningServer, checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts engines at one port; they end with the test."""
    port, engines = free_port(), []

    def engine(name: str, *words: str, failover: str = "{}") -> Engine:
        command = [sys.executable, "-m", "gms_trtllm", "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--tp_size", "2"]
        environment = child_environment(
            PYTHONPATH=PATHS,
            GMS_RUNTIME_DIR=str(server.directory),
            GMS_CACHE_DIR=str(tmp_path / "cache"),
            GMS_ENGINE=name,
            GMS_FAILOVER=failover,
        )
        engines.append(Engine(name, [*command, "--load-format", "gms", *words], environment, tmp_path / f"{name}.log", server, port))
        return engines[-1]

    yield engine
    for one in engines:
        one.end()


Start = Callable[..., Engine]


def asked(engine: Engine, path: str, body: Any = None) -> Any:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)) as connection:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        return json.loads(connection.getresponse().read())
    return None


def answer(engine: Engine) -> Any:
    """What it says, as soon as it can be reached."""
    said: list[Any] = []
    until(lambda: said.append(asked(engine, "/v1/completions", {"prompt": TOKENS})) or said[-1] is not None, patience_s=PATIENCE_S)
    return said[-1]["choices"]


@pytest.mark.parametrize(
    ("variant", "killed"),
    [(WITHOUT_GMS, "api-server 0"), (WITHOUT_GMS, "rank 0"), (WITHOUT_GMS, "rank 1"), (MERGED_FIRST, "rank 1"), (STAGED_HOOKS, "api-server 0")],
    indirect=["variant"],
)
def test_shadow_serves_when_a_process_of_the_primary_is_killed(start: Start, killed: str) -> None:
    first = start("one")
    first.becomes("primary")
    expected = answer(first)
    second = start("two")
    second.becomes("standby")
    assert sorted(member.process for member in second.cohort.members) == ["api-server 0", "rank 0", "rank 1"]
    os.kill(first.pid(killed), signal.SIGKILL)
    second.becomes("primary")
    until(first.is_gone, patience_s=PATIENCE_S)
    assert answer(second) == expected


@by_the_adapter
def test_engines_end_in_order_when_they_are_told_to(variant: str, start: Start, server: RunningServer) -> None:
    first = start("one")
    first.becomes("primary")
    expected = answer(first)
    second = start("two")
    second.becomes("standby")
    third = start("three")
    third.becomes("standby")
    assert third.ends_in_order(signal.SIGINT)
    assert first.ends_in_order(signal.SIGTERM)
    second.becomes("primary")
    assert answer(second) == expected
    result = CliRunner().invoke(gms, ["failover", "demote", "two", "--runtime-dir", str(server.directory)])
    assert result.exit_code == 0, result.output
    assert second.process.wait(PATIENCE_S) == 0, second.log


@by_the_adapter
def test_kv_memory_is_given_back_while_an_engine_stands_by_when_it_can_sleep(variant: str, start: Start, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("sleep_config: {}\n")
    engine = start("one", "--config", str(tmp_path / "options.yaml"), failover='{"autonomous": false}')
    engine.becomes("standby")
    assert (engine.log.count("released kv_cache"), engine.log.count("materialized kv_cache")) == (2, 0)
    assert asked(engine, "/health") is None
    result = CliRunner().invoke(gms, ["failover", "promote", "one", "--runtime-dir", str(engine.runtime_dir)])
    assert result.exit_code == 0, result.output
    engine.becomes("primary")
    assert (engine.log.count("released kv_cache"), engine.log.count("materialized kv_cache")) == (2, 2)
    assert answer(engine)


@by_the_adapter
def test_engine_is_refused_when_it_cannot_be_held(variant: str, start: Start) -> None:
    for name, words, failover, sentence in (
        ("gate", (), '{"gate": "503"}', "engines of TensorRT-LLM have the gate port alone"),
        ("grpc", ("--grpc",), "{}", "--grpc: a server of that kind cannot be held"),
        ("port", ("--port", "eight"), "{}", "--port eight is no port"),
        ("lock", (), '{"lock": "flock:/nowhere/at/all"}', "/nowhere/at/all cannot be opened"),
    ):
        engine = start(name, *words, failover=failover)
        assert engine.process.wait(PATIENCE_S) not in (0, 1)
        assert sentence in engine.log


@pytest.mark.timeout(600)
@by_the_adapter
def test_whole_story_passes_when_it_is_told_to_the_double(variant: str, checkpoint: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("gms", "gms_core.cli"), ("gms-trtllm-serve", "gms_trtllm serve")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (commands / name).chmod(0o755)
    environment = child_environment(
        PATH=f"{commands}:{os.environ['PATH']}",
        PYTHONPATH=PATHS,
        PYTHON=sys.executable,
        LOGS=str(tmp_path / "logs"),
        DEVICE="host",
        PATIENCE="120",
        GMS_CACHE_DIR=str(tmp_path / "cache"),
    )
    words = ["bash", str(STORY), str(checkpoint), "2", str(free_port())]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == ["FAIL  the installed TensorRT-LLM is as the adapter knows it"], done.stderr
    assert len([line for line in lines if line.startswith("PASS")]) == PARTS
    assert not [line for line in lines if line.startswith("SKIP")]


@by_the_adapter
def test_gms_run_keeps_a_shadow_when_it_starts_servers(variant: str, server: RunningServer, checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--tp_size", "2"]
    environment = {"PYTHONPATH": PATHS, "GMS_CACHE_DIR": str(tmp_path / "cache"), "GMS_PLUGINS": "trtllm"}
    command = [sys.executable, "-m", "gms_trtllm", "serve", str(checkpoint), *words]
    with gms_run(server.directory, "--shadows", "1", "--", *command, **environment) as run:
        run.wait_for("engine-0", "primary")
        run.wait_for("engine-1", "standby")
        run.interrupt()
        assert run.wait() == 0
