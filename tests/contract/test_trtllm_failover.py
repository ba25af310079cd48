"""Servers of TensorRT-LLM that fail over: processes of the double with two ranks each, which are killed, and whose shadow serves at their port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from trtllm_engines import by_the_adapter
from trtllm_servers import PATHS, PATIENCE_S, Start, answer, asked, streamed

from gms_core.cli import gms
from gms_core.config import child_environment
from gms_core.layout import Identity
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.trtllm_double import MERGED_FIRST, STAGED_HOOKS, WITHOUT_GMS
from tests.unit.gms_run import gms_run
from tests.unit.publishing import until

pytestmark = pytest.mark.timeout(300)
STORY = Path(__file__).parents[2] / "examples/trtllm/verify.sh"
PARTS = 15
"""All but the check of what is installed: the double is not."""


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
@pytest.mark.parametrize("way", ["demoted", "told to end"])
def test_answers_that_take_long_have_their_time_when_an_engine_ends(variant: str, start: Start, server: RunningServer, way: str) -> None:
    first = start("one", failover='{"drain_timeout_s": 2}')
    first.becomes("primary")
    answer(first)
    second = start("two")
    second.becomes("standby")
    with streamed(first, pieces=10) as short, streamed(first, pieces=600) as long:
        if way == "demoted":
            result = CliRunner().invoke(gms, ["failover", "demote", "one", "--runtime-dir", str(server.directory)])
            assert result.exit_code == 0, result.output
        else:
            first.process.send_signal(signal.SIGTERM)
        assert len(list(short)) == 10
        second.becomes("primary")
        assert first.process.wait(PATIENCE_S) == 0, first.log
        assert len(list(long)) < 600
    assert "although requests are running" in first.log
    assert "fenced" not in first.log
    assert answer(second)


@by_the_adapter
def test_ranks_end_when_the_process_that_began_them_is_killed_while_they_load(variant: str, start: Start, server: RunningServer) -> None:
    with server.connect() as session, session.acquire("weights", "rw", Identity({"content": "another"}), timeout_s=10):  # for which the ranks wait
        engine = start("one")
        until(lambda: len(engine.members("rank")) == 2, patience_s=PATIENCE_S)
        engine.process.kill()
        until(lambda: engine.cohort is None, patience_s=PATIENCE_S)


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
