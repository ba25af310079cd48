"""``gms failover status|promote|demote|drop``, and what ``gms status`` shows of engines, with real engines that obey."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.unit.engine_processes import processes
from tests.unit.gms_run import ENGINE, GmsRun, answer, gms_run

BY_HAND = json.dumps({"autonomous": False})


def _gms(server: RunningServer, *arguments: str) -> Result:
    return CliRunner().invoke(gms, [*arguments, "--runtime-dir", str(server.directory)])


def _done(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def _document(server: RunningServer) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(_done(_gms(server, "failover", "status", "-o", "json")))
    return told


def _cohort(server: RunningServer, engine: str) -> str:
    return next(found["cohort"] for found in _document(server)["engines"] if found["name"] == engine)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def shadows(server: RunningServer, port: int) -> Iterator[GmsRun]:
    """Two engines that stand by until they are told."""
    with gms_run(server.directory, "--", *ENGINE, "--port", str(port), GMS_FAILOVER=BY_HAND) as run:
        run.wait_for("engine-0", "standby")
        run.wait_for("engine-1", "standby")
        yield run
        run.interrupt()
        assert run.wait() == 0


@pytest.fixture
def pair(server: RunningServer) -> Iterator[GmsRun]:
    """A primary and a shadow that need no operator."""
    with gms_run(server.directory, "--", *ENGINE) as run:
        run.wait_for("engine-0", "primary")
        run.wait_for("engine-1", "standby")
        deadline = time.monotonic() + 30
        while not _document(server)["locks"][0]["waiting"]:  # a shadow stands by, and then asks for the lock
            assert time.monotonic() < deadline
        yield run
        run.interrupt()
        assert run.wait() == 0


def test_engine_that_is_named_becomes_the_primary_when_it_is_promoted(server: RunningServer, shadows: GmsRun, port: int) -> None:
    assert _done(_gms(server, "failover", "promote", "engine-1", "--wait")) == "engine-1 is the primary\n"
    assert answer(port)[0] == "engine-1"
    assert _done(_gms(server, "failover", "promote", "engine-1")) == "engine-1 is the primary already\n"


def test_roles_change_hands_when_the_next_is_promoted_and_the_primary_is_demoted(server: RunningServer, shadows: GmsRun, port: int) -> None:
    _done(_gms(server, "failover", "promote", "engine-0", "--wait"))
    told = _done(_gms(server, "failover", "promote"))
    assert told == "engine-1 is to be the next primary once engine-0 ends; to end it: gms failover demote engine-0\n"
    assert _done(_gms(server, "failover", "demote", "--wait")) == "engine-0 has ended\n"
    shadows.wait_for("engine-1", "primary", lambda event: event["epoch"] == 2)
    assert answer(port)[0] == "engine-1"
    assert shadows.wait_for("engine-0", "standby")["restarts"] == 1


def test_engine_is_found_by_its_cohort_when_that_is_named(server: RunningServer, shadows: GmsRun) -> None:
    cohort = _cohort(server, "engine-1")
    told = json.loads(_done(_gms(server, "failover", "promote", cohort, "--wait", "-o", "json")))
    assert told == {"schema": "gms-failover/1", "engine": "engine-1", "cohort": cohort, "order": "promote", "outcome": "is the primary"}


def test_promotion_fails_when_the_engine_dies_instead(server: RunningServer) -> None:
    with gms_run(server.directory, "--shadows", "0", "--", *ENGINE, "--dies-as", "promoting", GMS_FAILOVER=BY_HAND) as run:
        run.wait_for("engine-0", "standby")
        result = _gms(server, "failover", "promote", "--wait")
        run.interrupt()
        assert run.wait() == 0
    assert result.exit_code == ExitCode.FAILOVER
    assert result.stderr.startswith("gms: engine-0 has not become the primary: it has ended instead")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["promote", "engine-9"],
            ExitCode.NOT_FOUND,
            "there is no engine 'engine-9'\nhint: The engines are: engine-0 (standby), engine-1 (standby).",
        ),
        (["promote"], ExitCode.USAGE, "2 engines are standby: engine-0 (cohort "),
        (["demote"], ExitCode.NOT_FOUND, "no engine is primary"),
        (["demote", "engine-0"], ExitCode.FAILOVER, "engine-0 is standby: only a primary can be demoted"),
    ],
)
def test_order_is_refused_when_it_fits_no_engine(server: RunningServer, shadows: GmsRun, arguments: list[str], code: ExitCode, words: str) -> None:
    result = _gms(server, "failover", *arguments)
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


def test_retained_memory_is_freed_when_no_engine_uses_it(server: RunningServer) -> None:
    with processes() as begin:
        for pool in ("kv_cache", "other", "other.1"):
            engine = begin(server.socket, f"engine of {pool}")
            engine.ask("plan", pool, "a")
            engine.ask("provide", "plan", [4096])
        result = _gms(server, "failover", "drop", "kv_cache")
        assert (result.exit_code, "'kv_cache' of host is in use" in result.stderr) == (ExitCode.FAILURE, True)
    result = _gms(server, "failover", "drop", "no_such")
    assert (result.exit_code, "nothing is retained in no_such" in result.stderr) == (ExitCode.NOT_FOUND, True)
    assert _done(_gms(server, "failover", "drop", "kv_cache")) == "4 KiB of pool kv_cache on host are free\n"
    told = [json.loads(line) for line in _done(_gms(server, "failover", "drop", "other", "--ranks", "-o", "json")).splitlines()]
    assert told == [{"schema": "gms-failover/1", "device": "host", "pool": pool, "bytes": 4096} for pool in ("other", "other.1")]
    assert _done(_gms(server, "failover", "drop")) == ""


def test_retained_memory_of_another_pool_stays_when_its_name_only_begins_alike(server: RunningServer) -> None:
    with processes() as begin:
        for pool in ("llama-3", "llama-3.1"):
            engine = begin(server.socket, f"engine of {pool}")
            engine.ask("plan", pool, "a")
            engine.ask("provide", "plan", [4096])
    assert _done(_gms(server, "failover", "drop", "llama-3")) == "4 KiB of pool llama-3 on host are free\n"
    result = _gms(server, "failover", "drop", "llama-3")
    assert (result.exit_code, "nothing is retained in llama-3" in result.stderr) == (ExitCode.NOT_FOUND, True)
    assert _done(_gms(server, "failover", "drop", "llama-3.1", "--device", "host")) == "4 KiB of pool llama-3.1 on host are free\n"


def test_no_retained_memory_is_freed_when_one_of_the_servers_does_not_answer(server: RunningServer) -> None:
    with processes() as begin:
        engine = begin(server.socket, "engine")
        engine.ask("plan", "kv_cache", "a")
        engine.ask("provide", "plan", [4096])
    silent = server.directory / "GPU-00000000-0000-0000-0000-000000000000.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(silent))
        silent.chmod(0o600)
        result = _gms(server, "failover", "drop")
        assert (result.exit_code, silent.stem in result.stderr, "--device" in result.stderr) == (ExitCode.NO_SERVER, True, True)
        assert _done(_gms(server, "failover", "drop", "--device", "host")) == "4 KiB of pool kv_cache on host are free\n"
    silent.unlink()


def test_wait_ends_with_an_error_when_the_time_is_over(server: RunningServer, pair: GmsRun) -> None:
    result = _gms(server, "failover", "promote", "engine-1", "--wait", "--timeout", "0.2", "-o", "json")
    assert result.exit_code == ExitCode.TIMEOUT
    told = json.loads(result.stderr)["error"]
    assert told["message"] == "engine-1 is still standby and did not become the primary within 0.2 s"


def test_status_names_everything_when_engines_are_there(server: RunningServer, pair: GmsRun) -> None:
    document = _document(server)
    assert (document["schema"], document["runtime_dir"]) == ("gms-failover/1", str(server.directory))
    first, second = document["engines"]
    assert (first["name"], first["role"], first["epoch"], first["epochs"], first["devices"]) == (
        "engine-0",
        "primary",
        1,
        {"host/kv_cache": 1},
        ["host"],
    )
    assert (second["name"], second["role"], second["state"], second["epoch"], second["order"]) == ("engine-1", "standby", "alive", 0, "")
    assert {member["process"] for member in first["members"]} >= {"rank 0"}
    (lock,) = document["locks"]
    assert (lock["device"], lock["name"], lock["term"], lock["owner"], lock["waiting"]) == ("host", "primary", 1, first["cohort"], [second["cohort"]])
    (pool,) = document["retained"]
    assert (pool["device"], pool["name"], pool["state"], pool["holder"]) == ("host", "kv_cache", "held", first["cohort"])

    lines = [line.split("\t") for line in _done(_gms(server, "failover", "status", "-o", "lines")).splitlines()]
    assert [line[:5] for line in lines] == [
        ["engine-0", "primary", "alive", "1", first["cohort"]],
        ["engine-1", "standby", "alive", "0", second["cohort"]],
    ]
    assert {int(pid) for pid in lines[0][5].split(",")} == {member["pid"] for member in first["members"]}

    for table in (_done(_gms(server, "failover", "status")), _done(_gms(server, "status"))):
        for word in ("engine-0", "primary", "engine-1", "standby", "kv_cache", first["cohort"], "rank 0"):
            assert word in table


def test_status_shows_the_order_when_it_is_not_carried_out_yet(server: RunningServer, pair: GmsRun) -> None:
    _done(_gms(server, "failover", "promote", "engine-1"))
    assert "told to promote" in _done(_gms(server, "failover", "status"))


def test_status_says_so_when_there_is_no_engine_and_no_server(server: RunningServer, tmp_path: Path) -> None:
    assert _done(_gms(server, "failover", "status")) == "no engine\n"
    assert _done(_gms(server, "failover", "status", "-o", "lines")) == ""
    result = CliRunner().invoke(gms, ["failover", "promote", "--runtime-dir", str(tmp_path / "absent")])
    assert result.exit_code == ExitCode.NO_SERVER
    assert "gms serve starts them" in result.stderr
