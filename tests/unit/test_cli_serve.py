"""``gms serve``, ``gms status`` and ``gms bench attach`` as real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from gms_core import devices
from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import WriteLease, connect
from gms_core.config import child_environment
from gms_core.devices import Device
from gms_core.errors import ConnectionLost, DriverUnavailable, ServerUnavailable
from gms_core.layout import Identity
from tests.unit.engine_processes import Refused, processes

GMS = [sys.executable, "-m", "gms_core.cli"]


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A ``gms serve`` for the host device, once it says that it is ready."""
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(directory), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"host ready at {directory}/host.sock\n"
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def _status(directory: Path, *arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(gms, ["status", "--runtime-dir", str(directory), "-o", "json", *arguments])
    assert result.exit_code == 0, result.stderr
    document: dict[str, object] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_well_and_leaves_no_socket_when_it_is_told_to_stop(runtime_dir: Path, number: signal.Signals) -> None:
    with serving(runtime_dir) as process:
        process.send_signal(number)
        assert process.wait(20) == 0
    assert not (runtime_dir / "host.sock").exists()


def test_engine_lives_on_when_serve_is_told_to_stop(runtime_dir: Path) -> None:
    with serving(runtime_dir) as process, processes() as start:
        engine = start(runtime_dir / "host.sock", "a cohort")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        engine.tell("beat")
        with pytest.raises(Refused):
            engine.answer()


def test_server_comes_back_when_nobody_reads_what_serve_prints(runtime_dir: Path) -> None:
    with serving(runtime_dir) as process:
        assert process.stdout is not None
        process.stdout.close()
        with connect(socket_path=runtime_dir / "host.sock") as session:
            killed = session.status().pid
        subprocess.run(["kill", "-KILL", str(killed)], check=True)
        while True:
            try:
                with connect(socket_path=runtime_dir / "host.sock") as session:
                    assert session.status().pid != killed
                    break
            except (ServerUnavailable, ConnectionLost):
                assert process.poll() is None
        assert process.poll() is None


def test_server_comes_back_and_the_end_is_good_when_the_disk_of_the_output_is_full(runtime_dir: Path) -> None:
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir)]
    with Path("/dev/full").open("wb") as full, subprocess.Popen(command, stdout=full, env=child_environment(PYTHONUNBUFFERED="")) as process:
        try:
            first = _server_other_than(0, runtime_dir, process)
            subprocess.run(["kill", "-KILL", str(first)], check=True)
            _server_other_than(first, runtime_dir, process)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def _server_other_than(killed: int, directory: Path, supervisor: subprocess.Popen[bytes]) -> int:
    """Process of the device server, as soon as there is one that is not the killed one."""
    while True:
        try:
            with connect(socket_path=directory / "host.sock") as session:
                if (found := session.status().pid) != killed:
                    return found
        except (ServerUnavailable, ConnectionLost):
            assert supervisor.poll() is None
            time.sleep(0.02)


def test_host_memory_is_bounded_when_serve_is_told_so(runtime_dir: Path) -> None:
    with serving(runtime_dir, "--host-memory", "64MiB"), connect(socket_path=runtime_dir / "host.sock") as session:
        assert session.status().memory_total == 64 * 2**20


def test_serve_names_the_host_device_when_there_is_no_gpu(runtime_dir: Path) -> None:
    result = CliRunner().invoke(gms, ["serve", "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.NO_DEVICE
    assert "gms serve --device host" in result.stderr


def test_serve_says_how_to_get_the_gpus_bindings_too_when_they_are_missing(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_gpus() -> list[Device]:
        raise DriverUnavailable("NVML cannot be imported", hint="Install it with: pip install 'gms[cuda]'")

    monkeypatch.setattr(devices, "list_gpus", list_gpus)
    result = CliRunner().invoke(gms, ["serve", "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.NO_DEVICE
    assert "hint: Install it with: pip install 'gms[cuda]'. To serve host memory" in result.stderr


@pytest.mark.parametrize("name", ["", "7", "hots", "../../x", "GPU-1/x", "GPU 1"])
@pytest.mark.parametrize("command", [["serve"], ["status"], ["bench", "attach"]])
def test_name_is_refused_when_no_device_can_have_it(runtime_dir: Path, command: list[str], name: str) -> None:
    result = CliRunner().invoke(gms, [*command, "--runtime-dir", str(runtime_dir), "--device", name])
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith(f"gms: {name!r} is no device\nhint: Name host, or a GPU by the UUID")


def test_serve_refuses_host_memory_when_the_host_is_not_served(runtime_dir: Path) -> None:
    result = CliRunner().invoke(gms, ["serve", "--device", "GPU-1", "--host-memory", "1GiB", "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.USAGE
    assert "--device host" in result.stderr


def test_serve_refuses_when_another_server_has_the_device(runtime_dir: Path) -> None:
    with serving(runtime_dir):
        command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == ExitCode.NO_SERVER
    assert "already owns" in second.stderr


def test_serve_says_once_why_and_what_to_do_when_something_is_in_the_way(runtime_dir: Path) -> None:
    (runtime_dir / "host.new").mkdir()
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == ExitCode.NO_SERVER
    said, hint = result.stderr.splitlines()
    assert said == f"gms: the socket {runtime_dir}/host.sock cannot be made: Is a directory"
    assert hint.startswith("hint: See that there is room")


def test_serve_refuses_when_others_can_enter_the_runtime_directory(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o777)
    result = CliRunner().invoke(gms, ["serve", "--device", "host", "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.PERMISSION


def test_status_says_how_to_start_a_server_when_there_is_none(runtime_dir: Path) -> None:
    result = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir / "absent")])
    assert result.exit_code == ExitCode.NO_SERVER
    assert "hint: Start one with: gms serve" in result.stderr


def test_status_shows_pools_and_sessions_when_something_is_published(runtime_dir: Path) -> None:
    identity = Identity({"model": "toy"})
    with serving(runtime_dir), connect(socket_path=runtime_dir / "host.sock", client="a writer") as session:
        lease = session.acquire("weights", "rw", identity, timeout_s=5)
        assert isinstance(lease, WriteLease)
        lease.arena.allocate(5000)
        with lease.commit(b"manifest", identity):
            document = _status(runtime_dir)
            table = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir)]).stdout
            watched = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir), "--device", "host"]).stdout
    assert (document["schema"], document["runtime_dir"]) == ("gms-status/1", str(runtime_dir))
    (server,) = document["servers"]  # type: ignore[misc]
    assert (server["state"], server["device"], server["driver"]) == ("up", "host", "host")
    (pool,) = server["pools"]
    assert (pool["name"], pool["state"], pool["generation"], pool["identity"], len(pool["readers"])) == (
        "weights",
        "committed",
        1,
        {"model": "toy"},
        1,
    )
    assert "a writer" in [found["client"] for found in server["sessions"]]
    for output in (table, watched):
        assert "weights" in output
        assert "toy" in output
        assert "a writer" in output


def test_status_shows_the_socket_as_dead_when_its_server_was_killed(runtime_dir: Path) -> None:
    with serving(runtime_dir) as process:
        with connect(socket_path=runtime_dir / "host.sock") as session:
            child = session.status().pid
        process.send_signal(signal.SIGSTOP)  # so that it does not start the device server again
        subprocess.run(["kill", "-KILL", str(child)], check=True)
        result = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir), "-o", "json"])
        table = CliRunner().invoke(gms, ["status", "--runtime-dir", str(runtime_dir)])
        process.send_signal(signal.SIGCONT)
    assert result.exit_code == table.exit_code == ExitCode.NO_SERVER
    (server,) = json.loads(result.stdout)["servers"]
    assert (server["state"], server["device"], server["error"]["code"]) == ("dead", "host", "server_unavailable")
    assert "dead" in table.stdout


def test_status_prints_a_line_each_time_and_ends_well_when_it_watches(runtime_dir: Path) -> None:
    with serving(runtime_dir):
        command = [*GMS, "status", "--runtime-dir", str(runtime_dir), "-o", "json", "--watch", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 0
    assert [line["servers"][0]["state"] for line in lines] == ["up", "up"]


def test_bench_measures_both_ways_when_it_starts_its_own_server() -> None:
    arguments = ["bench", "attach", "--device", "host", "--bytes", "8MiB", "--slab", "4MiB", "--repeat", "2", "-o", "json"]
    result = CliRunner().invoke(gms, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["schema"], document["bytes"], document["slab"], document["allocations"]) == ("gms-bench-attach/1", 8 * 2**20, 4 * 2**20, 2)
    assert set(document["times"]["attach"]) == {"connect", "acquire", "export", "reserve", "import", "map", "access", "rest", "total"}
    assert set(document["times"]["bare"]) == {"reserve", "import", "map", "access", "rest", "total"}
    for kind in document["times"].values():
        total, phases = kind.pop("total"), kind
        assert 0 < total["min"] <= total["median"] <= total["max"]
        assert all(0 <= phase["min"] <= total["max"] for phase in phases.values())


def test_bench_names_the_device_when_there_is_none_of_that_name() -> None:
    result = CliRunner().invoke(gms, ["bench", "attach", "--device", "GPU-0", "-o", "json"])
    assert result.exit_code == ExitCode.NO_DEVICE
    error = json.loads(result.stderr)["error"]
    assert error["code"] == "device_not_found"


def test_bench_gives_the_memory_back_when_it_used_a_running_server(runtime_dir: Path) -> None:
    with serving(runtime_dir):
        result = CliRunner().invoke(gms, ["bench", "attach", "--runtime-dir", str(runtime_dir), "--bytes", "4MiB", "--repeat", "1"])
        assert result.exit_code == 0, result.output
        assert "from connecting to mapped" in result.stdout
        (server,) = _status(runtime_dir)["servers"]  # type: ignore[misc]
    assert server["allocated_bytes"] == 0


def test_bench_says_so_when_the_pool_cannot_fit(runtime_dir: Path) -> None:
    with serving(runtime_dir, "--host-memory", "16MiB"):
        result = CliRunner().invoke(gms, ["bench", "attach", "--runtime-dir", str(runtime_dir), "--bytes", "64MiB", "-o", "json"])
    assert result.exit_code == ExitCode.NO_MEMORY
    told = json.loads(result.stderr)["error"]
    assert (told["code"], told["retryable"]) == ("allocation_too_large", False)
    assert "--bytes" in told["hint"]


def test_bench_says_so_when_the_size_is_not_whole(runtime_dir: Path) -> None:
    with serving(runtime_dir):
        result = CliRunner().invoke(gms, ["bench", "attach", "--runtime-dir", str(runtime_dir), "--bytes", "4097"])
    assert result.exit_code == ExitCode.USAGE
    assert "granularity" in result.stderr


def test_bench_says_so_when_no_server_is_in_the_directory(runtime_dir: Path) -> None:
    result = CliRunner().invoke(gms, ["bench", "attach", "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.NO_SERVER
