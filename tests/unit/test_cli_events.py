"""``gms events`` and ``gms status --watch`` as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from gms_core.cli import gms
from gms_core.cli.events import Lines, Moment
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import connect
from gms_core.config import child_environment
from gms_core.fleet.event_reader import Told
from gms_core.protocol.messages import Event
from tests.conftest import RunningServer, running_server
from tests.unit.publishing import publish

GMS = [sys.executable, "-m", "gms_core.cli"]


def run(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(gms, ["events", "--runtime-dir", str(directory), *arguments])


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on until it is told to end."""
    process = subprocess.Popen([*GMS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    line: dict[str, object] = json.loads(process.stdout.readline())
    return line


def next_of(process: subprocess.Popen[str], kind: str) -> dict[str, object]:
    while (line := line_of(process))["kind"] != kind:
        pass
    return line


def test_events_are_shown_as_a_table_and_as_lines_of_json(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"bytes").release()
    table = run(server.directory)
    assert table.exit_code == 0, table.output
    heading, *rows = table.stdout.splitlines()
    assert heading.split() == ["time", "device", "kind", "subject", "event"]
    assert [row.split()[3] for row in rows] == ["server_started", "pool_draft_begun", "pool_committed", "pool_lease_released"]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  host  ", rows[0])
    assert "committed generation 1" in rows[2]
    lines = [json.loads(line) for line in run(server.directory, "-o", "json").stdout.splitlines()]
    assert {line["schema"] for line in lines} == {"gms-events/1"}
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    committed = lines[2]
    assert (committed["device"], committed["kind"], committed["subject"]) == ("host", "pool_committed", "weights")
    assert committed["facts"]["generation"] == 1
    assert committed["text"] in rows[2]
    assert 0 <= time.time() - committed["time"] < 120
    assert committed["monotonic_s"] <= time.monotonic()


def test_table_is_in_order_when_a_server_of_an_older_version_tells_of_a_wild_name(capsys: pytest.CaptureFixture[str]) -> None:
    Lines("table", ["host"]).show(
        Told("host", "log", Event(1, 0.0, 0.0, "engine_joined", "engine\x1b[2J", {"process": "a\nb", "pid": 1, "cohort": "c"}))
    )
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2


def test_only_the_last_or_the_newest_are_shown_when_that_is_asked_for(server: RunningServer) -> None:
    with server.connect() as session:
        publish(session, b"bytes").release()

    def kinds(*arguments: str) -> list[str]:
        return [json.loads(line)["kind"] for line in run(server.directory, "-o", "json", *arguments).stdout.splitlines()]

    assert kinds("--last", "2") == ["pool_committed", "pool_lease_released"]
    assert kinds("--last", "0") == []
    assert len(kinds("--since", "1h")) == 4
    assert len(kinds("--since", "2020-01-01T00:00:00")) == 4
    assert kinds("--since", "2100-01-01") == []
    assert kinds("--since", "1h", "--last", "1") == ["pool_lease_released"]


def test_moments_of_the_past_are_understood_when_they_are_spans_or_times() -> None:
    moment = Moment()
    assert moment.convert("2026-01-31T12:00:00+00:00", None, None) == datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    for text, seconds in {"90": 90, "90s": 90, "1.5m": 90, "2h": 7200, "1d": 86400}.items():
        assert abs(time.time() - seconds - moment.convert(text, None, None)) < 5
    for wrong in ("yesterday", "-5m", "5w", ""):
        with pytest.raises(click.BadParameter):
            moment.convert(wrong, None, None)


def test_events_of_the_next_server_follow_when_one_is_killed_and_ctrl_c_ends_it(server: RunningServer) -> None:
    with started("events", "--runtime-dir", str(server.directory), "-o", "json", "--follow") as following, server.connect() as session:
        first = line_of(following)
        assert first["kind"] == "server_started"
        lease = publish(session, b"bytes")
        next_of(following, "pool_committed")
        server.kill()
        adopted = next_of(following, "server_adopted")
        assert (adopted["number"], adopted["log"] != first["log"]) == (1, True)
        lease.release()
        next_of(following, "pool_lease_released")
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 0
        assert following.stderr is not None
        assert following.stderr.read() == ""


def test_follower_shows_the_last_ten_then_what_comes_when_there_is_a_long_past(server: RunningServer) -> None:
    with server.connect() as session:
        for _ in range(20):
            publish(session, b"bytes").release()
        with started("events", "--runtime-dir", str(server.directory), "-o", "json", "--follow") as following:
            numbers = [line_of(following)["number"] for _ in range(10)]
            publish(session, b"bytes").release()
            numbers += [line_of(following)["number"] for _ in range(4)]
    assert numbers == list(range(numbers[0], numbers[0] + 14))  # type: ignore[arg-type, operator, call-overload]


def test_follower_ends_like_other_commands_when_nobody_reads_what_it_prints(server: RunningServer) -> None:
    with started("events", "--runtime-dir", str(server.directory), "--follow", "--last", "0") as following, server.connect() as session:
        assert following.stdout is not None
        following.stdout.readline()
        following.stdout.close()
        deadline = time.monotonic() + 30
        while following.poll() is None:
            assert time.monotonic() < deadline
            publish(session, b"bytes").release()
        assert following.returncode == 1
        assert following.stderr is not None
        assert "Traceback" not in following.stderr.read()


def test_servers_that_answer_are_shown_and_the_dead_one_is_named_when_there_are_both(server: RunningServer) -> None:
    dead = server.directory / "GPU-00000000-0000-0000-0000-000000000000.sock"
    dead.touch(mode=0o600)
    result = run(server.directory)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 2)
    assert str(dead) in result.stderr
    only = run(server.directory, "--device", dead.stem, "-o", "json")
    assert (only.exit_code, only.stdout) == (ExitCode.FAILURE, "")


def test_how_to_start_a_server_is_said_when_there_is_none(runtime_dir: Path) -> None:
    result = run(runtime_dir)
    assert result.exit_code == ExitCode.NO_SERVER
    assert "hint: Start one with: gms serve" in result.stderr


def test_follower_waits_for_the_next_server_when_one_has_ended_for_good(runtime_dir: Path) -> None:
    with contextlib.ExitStack() as ends:
        with running_server(runtime_dir):
            following = ends.enter_context(started("events", "--runtime-dir", str(runtime_dir), "-o", "json", "-f"))
            first = line_of(following)
        with running_server(runtime_dir):
            second = next_of(following, "server_started")
    assert first["log"] != second["log"]


def test_watched_status_is_shown_at_once_when_something_happens(server: RunningServer) -> None:
    command = ["status", "--runtime-dir", str(server.directory), "-o", "json", "--watch", "3600"]
    with started(*command) as watching, connect(socket_path=server.socket) as session:
        assert line_of(watching)["servers"][0]["pools"] == []  # type: ignore[index]
        lease = publish(session, b"bytes")
        while not (pools := line_of(watching)["servers"][0]["pools"]) or pools[0]["state"] != "committed":  # type: ignore[index]
            pass
        assert len(pools[0]["readers"]) == 1
        lease.release()
        while line_of(watching)["servers"][0]["pools"][0]["readers"]:  # type: ignore[index]
            pass
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0


def test_watched_status_is_drawn_in_place_on_a_terminal_and_ctrl_c_ends_it(server: RunningServer) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [*GMS, "status", "--runtime-dir", str(server.directory), "--watch", "3600"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=child_environment(TERM="xterm", COLUMNS="160")) as process:
            try:
                drawn = _drawn_until(ours, b"Ctrl-C ends")
                with server.connect() as session:
                    lease = publish(session, b"bytes")
                    drawn += _drawn_until(ours, b"committed")
                    lease.release()
                process.send_signal(signal.SIGINT)
                drawn += _drawn_until(ours, b"\x1b[?1049l")
                assert process.wait(20) == 0
            finally:
                process.kill()
        assert b"\x1b[?1049h" in drawn, "on a screen of its own"
    finally:
        os.close(ours)
        os.close(theirs)


def _drawn_until(terminal: int, wanted: bytes) -> bytes:
    drawn = b""
    while wanted not in drawn:
        assert select.select([terminal], [], [], 30)[0], drawn
        drawn += os.read(terminal, 65536)
    return drawn


def test_watched_status_tells_of_a_restart_at_once_when_its_server_is_killed(server: RunningServer) -> None:
    with started("status", "--runtime-dir", str(server.directory), "-o", "json", "--watch", "3600") as watching:
        before = line_of(watching)["servers"][0]["pid"]  # type: ignore[index]
        server.kill()
        while (found := line_of(watching)["servers"][0]).get("pid", before) == before:  # type: ignore[index]
            pass
        assert found["observation"]["restarts"] == {"adopted": 1}
