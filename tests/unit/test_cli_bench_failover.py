"""``gms bench failover`` as real processes, with engines that do with GMS what real ones do; and the figures that it makes of samples."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.failover_benchmark import Wanted, _Benchmark
from gms_core.cli.failover_benchmark_client import Endpoint, endpoint_of
from gms_core.cli.failover_benchmark_fleet import promotions
from gms_core.cli.failover_benchmark_restart import default_port
from gms_core.cli.failover_benchmark_result import Failover, Requests, Restart, bars, differences, document, moments, read, spread
from gms_core.cli.failover_benchmark_result import Result as Measured
from gms_core.errors import InvalidArgument
from tests.ports import free_port

ENGINE = [sys.executable, str(Path(__file__).with_name("fake_serving_engine.py"))]
EVENTS = {"noticed", "gone", "elected", "held", "mapped", "promoted", "listening", "first_token"}


@pytest.fixture
def port() -> int:
    return free_port()


def arguments(port: int, *options: str, engine: Sequence[str] = ()) -> list[str]:
    return ["bench", "failover", "--device", "host", *options, "--", *ENGINE, "--port", str(port), *engine]


def bench(port: int, *options: str, engine: Sequence[str] = ()) -> Result:
    return CliRunner().invoke(gms, arguments(port, "-o", "json", *options, engine=engine))


def named_on_their_command_line(words: str) -> list[str]:
    """Processes whose command line has these words."""
    found = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if words in line]


def test_kills_are_measured_beside_restarts_when_parts_of_the_primary_are_killed(port: int, tmp_path: Path) -> None:
    saved, picture = tmp_path / "result.json", tmp_path / "timeline.svg"
    options = ["--kills", "4", "--kill", "mixed", "--seed", "1", "--load", "3", "--log-dir", str(tmp_path / "logs")]
    result = bench(port, *options, engine=["--loads-for", "0.3"])
    assert result.exit_code == 0, result.output
    saved.write_text(result.stdout)
    told = json.loads(result.stdout)
    assert (told["schema"], told["devices"], told["kills"], told["kill"]) == ("gms-bench-failover/1", ["host"], 4, "mixed")
    assert (told["max_primaries"], told["stock_tokens_equal"]) == (1, True)
    assert told["summary"]["wrong_tokens"] == 0
    assert told["summary"]["faults"] == []
    assert told["restarts"].keys() == told["summary"]["restart_to_failover_ratio"].keys() == {"cold", "warm"}
    assert len({failover["kind"] for failover in told["failovers"]}) > 1
    for term, failover in enumerate(told["failovers"], 2):
        assert failover["events"].keys() == EVENTS
        assert {failover["engine"], failover["successor"]} == {"engine-0", "engine-1"}
        assert (failover["term"], failover["epoch"]) == (term, term)
        times = failover["events"]
        assert 0 <= times["noticed"] <= times["gone"] <= times["held"] <= times["listening"] <= times["first_token"]
        assert failover["requests"]["in_flight"] == 3
        assert failover["requests"]["in_flight_failed"] == 3 or failover["kind"] not in ("group", "front-end")
        assert failover["compared_tokens"] == 1 + 3 * 64
    kept = [msgspec.json.decode(line, type=Failover) for line in (tmp_path / "logs/kills.jsonl").read_bytes().splitlines()]
    assert kept == list(read(saved).failovers)
    assert named_on_their_command_line(f"--port {port}") == []

    shown = CliRunner().invoke(gms, ["bench", "failover", "--show", str(saved), "--timeline", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "4 kills (mixed) on host" in shown.stdout
    assert "restart without GMS, warm" in shown.stdout
    assert "0 wrong; primaries at once: 1" in shown.stdout
    text = picture.read_text()
    assert all(words in text for words in ("milliseconds after the kill", "shadow: waits for the memory", "dead engine"))


def test_exit_code_tells_when_tokens_are_wrong_after_a_kill(port: int) -> None:
    result = bench(port, "--kills", "2", "--load", "0", "--restarts", "none", engine=["--lies-in-term", "2"])
    assert result.exit_code == ExitCode.FINDINGS, result.output
    told = json.loads(result.stdout)
    assert [failover["wrong_tokens"] for failover in told["failovers"]] == [1 + 3 * 64, 0]
    assert told["failovers"][0]["requests"]["in_flight"] == 0
    assert told["summary"]["faults"] == ["193 tokens were wrong after a kill"]
    assert (told["restarts"], told["stock_tokens_equal"], told["restart_command"]) == ({}, None, [])


def test_exit_code_tells_when_two_engines_say_that_they_are_the_primary(port: int) -> None:
    result = bench(port, "--kills", "2", "--load", "1", "--restarts", "none", engine=["--claims-to-serve"])
    assert result.exit_code == ExitCode.FINDINGS, result.output
    told = json.loads(result.stdout)
    assert (told["max_primaries"], told["failovers"]) == (2, [])
    assert told["summary"]["faults"] == ["2 engines were the primary at once", "only 0 of 2 kills were done"]
    assert named_on_their_command_line(f"--port {port}") == []


def test_end_of_the_log_is_told_when_the_engine_cannot_start(port: int) -> None:
    result = bench(port, engine=["--fails"])
    assert result.exit_code == ExitCode.FAILOVER
    error = json.loads(result.stderr)["error"]
    assert error["code"] == "engine_failed"
    assert error["message"].endswith("exited with code 1 before it answered: there is no such model")
    assert "--log-dir" in error["hint"]


def test_it_gives_up_when_shadows_fail_to_start(port: int) -> None:
    result = bench(port, "--restarts", "none", engine=["--fails-beside-a-primary"])
    assert result.exit_code == ExitCode.FAILOVER, result.output
    error = json.loads(result.stderr)["error"]
    assert error["message"] == "engine-1 has failed to start 3 times in a row; it exited with code 1"
    assert "there is no room beside a primary" in error["hint"]


def test_command_of_the_engine_without_gms_is_used_when_it_is_given(port: int) -> None:
    other = f"{ENGINE[0]} {ENGINE[1]} --port {port} --fails"
    result = bench(port, "--restart-command", other)
    assert json.loads(result.stderr)["error"]["message"].endswith("there is no such model")


def test_figures_are_told_and_nothing_is_left_when_it_is_told_to_end(port: int, tmp_path: Path) -> None:
    options = ["--restarts", "none", "--kills", "1000", "--log-dir", str(tmp_path), "-o", "json"]
    command = [sys.executable, "-m", "gms_core.cli", *arguments(port, *options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "kills.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == ExitCode.INTERRUPTED
    told = json.loads(output)
    assert told["failovers"]
    assert told["summary"]["faults"][1] == "the run has ended early: it was interrupted"
    assert named_on_their_command_line(f"--port {port}") == []
    assert named_on_their_command_line(str(tmp_path)) == []


def test_a_warning_is_given_once_when_results_cannot_be_kept(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = Wanted(command=(), restart_command=(), endpoint=Endpoint("127.0.0.1", port))
    benchmark = _Benchmark(wanted, lambda _: None, tmp_path)
    (tmp_path / "kills.jsonl").symlink_to("/dev/full")
    for number in (1, 2):
        benchmark._keep(failover(number, 0.25))
    assert capsys.readouterr().err == f"gms: {tmp_path}/kills.jsonl cannot be written any more: No space left on device\n"


def test_figures_are_told_when_the_picture_cannot_be_written(tmp_path: Path) -> None:
    saved, picture = tmp_path / "result.json", tmp_path / "timeline.svg"
    saved.write_text(json.dumps(document(measured(failover(1, 0.25)))))
    picture.symlink_to("/dev/full")
    result = CliRunner().invoke(gms, ["bench", "failover", "--show", str(saved), "--timeline", str(picture)])
    assert result.exit_code == ExitCode.USAGE
    assert "1 kill (group) on host" in result.stdout
    assert result.stderr == f"gms: --timeline {picture} cannot be written: No space left on device\n"


def test_it_refuses_a_port_at_which_somebody_answers_already() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = bench(other.getsockname()[1])
    assert result.exit_code == ExitCode.USAGE
    assert "something answers" in json.loads(result.stderr)["error"]["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timeline", "picture.pdf"], "is no picture"),
        (["--timeline", "/no/such/directory/picture.svg"], "no such directory"),
        (["--device", "hots"], "'hots' is no device"),
        (["--restart-command", "'"], "cannot be read"),
        (["--restart-command", "no-such-program"], "there is no command 'no-such-program'"),
        (["--show", __file__], "cannot be read as a result"),
    ],
)
def test_it_refuses_at_once_what_it_cannot_do_in_the_end(port: int, options: list[str], words: str) -> None:
    result = bench(port, *options)
    assert result.exit_code == ExitCode.USAGE
    assert words in json.loads(result.stderr)["error"]["message"]


def test_it_says_how_to_get_matplotlib_when_a_picture_is_wanted_without(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gms_core.cli.failover_benchmark_plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench(port, "--timeline", "picture.svg")
    assert result.exit_code == ExitCode.USAGE
    assert "gms[bench]" in json.loads(result.stderr)["error"]["hint"]


@pytest.mark.parametrize("options", [["--restarts", "hot"], ["--kills", "0"], ["--kill", "server"], ["--shadow", "1"]])
def test_it_refuses_options_that_mean_nothing(port: int, options: list[str]) -> None:
    assert bench(port, *options).exit_code == ExitCode.USAGE


def test_it_wants_a_command_when_there_is_no_saved_result() -> None:
    assert "Missing argument 'COMMAND...'" in CliRunner().invoke(gms, ["bench", "failover"]).stderr


def test_it_asks_for_the_other_command_when_the_command_uses_gms() -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "any", "--load-format", "gms"]
    result = CliRunner().invoke(gms, ["bench", "failover", "-o", "json", "--", *command])
    assert result.exit_code == ExitCode.USAGE
    assert "--restart-command" in json.loads(result.stderr)["error"]["hint"]


@pytest.mark.parametrize(
    ("command", "endpoint"),
    [
        (["vllm", "serve", "any"], Endpoint("127.0.0.1", 8000)),
        (["vllm", "serve", "any", "--port", "81", "--host", "0.0.0.0"], Endpoint("127.0.0.1", 81)),
        (["vllm", "serve", "any", "--port=82", "--host=::"], Endpoint("::1", 82)),
        (["vllm", "serve", "any", "--host", "10.0.0.7"], Endpoint("10.0.0.7", 8000)),
        (["any", "program"], Endpoint("127.0.0.1", 8000)),
        (["python", "-m", "sglang.launch_server", "--model-path", "any"], Endpoint("127.0.0.1", 30000)),
    ],
)
def test_endpoint_is_that_of_the_command_when_it_names_one(command: list[str], endpoint: Endpoint) -> None:
    assert endpoint_of(command, default_port(command)) == endpoint


@pytest.mark.parametrize("option", [["--port", "800{n}"], ["--port", "0"], ["--uds", "/tmp/any"]])
def test_endpoint_is_refused_when_engines_cannot_share_it(option: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        endpoint_of(["vllm", "serve", "any", *option], 8000)


def failover(number: int, first_token: float, **changes: Any) -> Failover:
    events = {"noticed": 0.002, "gone": 0.2, "elected": 0.04, "held": 0.21, "mapped": 0.21, "listening": 0.212, "first_token": first_token}
    fields = {"kind": "group", "engine": "engine-0", "successor": "engine-1", "term": 2, "epoch": 2, "compared_tokens": 10, "wrong_tokens": 0}
    requests = Requests(in_flight=8, in_flight_failed=8, broken=1, refused=30)
    return Failover(**{"number": number, "events": events, "requests": requests, **fields, **changes})


def measured(*failovers: Failover, **changes: Any) -> Measured:
    fields = {"gms": "1", "devices": ("host",), "command": ("vllm", "serve"), "restart_command": ("vllm", "serve"), "kill": "group"}
    numbers = {"kills": len(failovers), "shadows": 1, "load": 8, "prompt_tokens": 32, "new_tokens": 64, "seed": 0, "max_primaries": 1}
    more = {"restarts": {"warm": Restart(46.0, 0.2)}, "failovers": failovers, "stock_tokens_equal": None}
    return Measured(**{**fields, **numbers, **more, **changes})


def test_summary_has_spread_ratio_and_counts_when_there_are_several_kills() -> None:
    told: Any = document(measured(failover(1, 0.25), failover(2, 0.23), failover(3, 0.30)))["summary"]
    assert told["seconds_after_kill"]["first_token"] == {"min": 0.23, "median": 0.25, "p95": pytest.approx(0.295), "max": 0.30}
    assert told["seconds_after_kill"]["first_token_after_gone"]["median"] == pytest.approx(0.05)
    assert told["restart_to_failover_ratio"] == {"warm": pytest.approx(184.0)}
    assert (told["failed_requests"], told["wrong_tokens"], told["faults"]) == (27, 0, [])


def test_faults_are_named_when_a_run_is_not_good() -> None:
    result = measured(failover(1, 0.25, wrong_tokens=2), max_primaries=2, kills=2)
    assert result.faults() == ["2 engines were the primary at once", "2 tokens were wrong after a kill", "only 1 of 2 kills were done"]


def test_spread_is_one_value_when_there_is_one_sample() -> None:
    assert msgspec.structs.astuple(spread([0.5])) == (0.5, 0.5, 0.5, 0.5)


def test_timeline_is_that_of_the_median_and_in_order_when_it_is_told() -> None:
    chosen = measured(failover(1, 0.25), failover(2, 0.23), failover(3, 0.30), failover(4, 0.24)).median_failover()
    assert chosen is not None
    assert chosen.number == 4
    assert [(moment.name, round(moment.after_ms)) for moment in moments(chosen)] == [
        ("killed", 0),
        ("noticed", 2),
        ("elected", 40),
        ("gone", 200),
        ("held", 210),
        ("mapped", 210),
        ("listening", 212),
        ("first_token", 240),
    ]


def test_bars_have_what_took_its_time_when_a_timeline_is_drawn() -> None:
    found = {(bar.lane, bar.label): (round(bar.start_ms), round(bar.end_ms)) for bar in bars(failover(1, 0.25))}
    assert found["dead engine", "exits"] == (2, 200)
    assert found["shadow", "waits for the memory"] == (40, 210)
    assert found["client", "first token"] == (212, 250)
    assert ("shadow", "maps it") not in found, "it took no time"


def test_bars_are_those_that_are_known_when_the_log_did_not_tell_of_the_promotion() -> None:
    chosen = failover(1, 0.25, events={"noticed": 0.002, "gone": 0.2, "first_token": 0.25})
    assert {bar.lane for bar in bars(chosen)} == {"dead engine"}


def test_differences_are_counted_when_an_answer_is_wrong_or_too_short() -> None:
    assert differences([(1, 2, 3), (4, 9), ()], [(1, 2, 3), (4, 5), (6, 7)]) == (7, 3)


def test_promotions_are_found_when_a_log_tells_of_them() -> None:
    line = "e serves [gms event=promoted engine=e term=3 epoch=4 elected_at=17.5 elected_clock_s=12.25 held_ms=1.5 mapped_ms=2.5 listening_ms=3]"
    found = promotions(f"noise [gms event=attached]\n{line}\nnoise\n")
    assert [(one.engine, one.term, one.epoch, one.elected_s) for one in found] == [("e", 3, 4, 12.25)]
    assert found[0].after_ms == {"held": 1.5, "mapped": 2.5, "listening": 3.0}
