"""``gms serve``, ``gms status`` and ``gms bench attach`` as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from gms_core import devices
from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.client import Session, WriteLease, connect
from gms_core.config import child_environment
from gms_core.devices import HOST, Device
from gms_core.errors import ConnectionLost, DriverUnavailable, ServerUnavailable, VersionMismatch
from gms_core.layout import Identity
from gms_core.runtime_dir import journal_path
from gms_core.server.journal import Journal
from gms_core.server.records import About
from gms_core.server.state import decode, encode
from gms_core.server.supervisor import serve
from tests.conftest import keepers, owner
from tests.unit.engine_processes import Refused, processes
from tests.unit.publishing import MODEL, PAGE, publish, read_all

GMS = [sys.executable, "-m", "gms_core.cli"]


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A ``gms serve`` for the host device, once it says that it is ready."""
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(directory), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
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


def _facts(session: Session) -> tuple[object, ...]:
    """What does not change when another server takes over."""
    report = session.status()
    published = [(pool.name, pool.generation, pool.digest, pool.bytes, pool.readers) for pool in report.pools]
    retained = [(pool.name, pool.epoch, pool.bytes, pool.holder) for pool in report.retained]
    locks = [(lock.name, lock.term, lock.owner, lock.waiting) for lock in report.locks]
    engines = [(cohort.name, cohort.state, [member.pid for member in cohort.members]) for cohort in report.cohorts]
    return published, retained, locks, engines, report.allocated_bytes, report.allocations


def test_everything_is_as_before_when_a_second_serve_replaces_the_first(runtime_dir: Path) -> None:
    socket, data = runtime_dir / "host.sock", b"weights" * 5000
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(runtime_dir))]
        start = stack.enter_context(processes())
        engine = start(socket, "a cohort")
        assert engine.ask("plan", "kv", "a") is None
        engine.ask("provide", "plan", [4 * PAGE])
        assert (engine.ask("hold", 5.0), engine.ask("elect", "primary", 1.0)) == (1, 1)
        writer, reader = (stack.enter_context(connect(socket_path=socket)) for _ in range(2))
        publish(writer, data).release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=5)
        assert read_all(reader, lease, len(data)) == data
        before, pid = _facts(reader), reader.status().pid
        for _ in range(2):
            servers.append(stack.enter_context(serving(runtime_dir, "--replace")))
            assert servers[-2].wait(20) == 0
            assert _facts(reader) == before
            assert reader.status().pid != pid
            pid = reader.status().pid
        lease.unmap()
        lease.remap()
        assert reader.driver.read(lease.arena.base, len(data)) == data
        late = writer.acquire("weights", "ro", MODEL, timeout_s=5)
        assert read_all(writer, late, len(data)) == data
        late.release()
        lease.release()
        assert engine.ask("beat") is None
        other = start(socket, "another cohort")
        assert other.ask("plan", "kv", "a") == ["plan", 4 * PAGE, 1]
        engine.kill()
        assert (other.ask("hold", 20.0), other.ask("elect", "primary", 20.0)) == (2, 2)
        servers[-1].send_signal(signal.SIGTERM)
        assert servers[-1].wait(20) == 0
    assert not socket.exists()


def test_memory_is_given_up_when_the_serve_that_has_replaced_another_is_told_to_stop(runtime_dir: Path) -> None:
    with serving(runtime_dir), connect(socket_path=runtime_dir / "host.sock") as session:
        lease = publish(session, b"bytes")
        with serving(runtime_dir, "--replace") as second:
            second.send_signal(signal.SIGTERM)
            assert second.wait(20) == 0
        with pytest.raises(ConnectionLost):
            session.status()
        lease.release()
    assert [path.name for path in runtime_dir.iterdir()] == ["host.lock"]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_memory_is_given_up_when_serve_is_told_to_stop_while_its_device_server_is(runtime_dir: Path, how: str) -> None:
    with serving(runtime_dir) as process:
        process.send_signal(signal.SIGSTOP)  # so that it does not start the device server again
        os.kill(owner(runtime_dir / "host.sock"), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0
        assert keepers(runtime_dir) == []


def test_serve_replaces_nobody_and_serves_when_nothing_runs(runtime_dir: Path) -> None:
    with serving(runtime_dir, "--replace"), connect(socket_path=runtime_dir / "host.sock") as session:
        publish(session, b"bytes").release()


def test_serve_leaves_what_a_later_version_has_left_to_that(runtime_dir: Path) -> None:
    with serving(runtime_dir) as first, connect(socket_path=runtime_dir / "host.sock") as session:
        lease = publish(session, b"bytes")
        before = _facts(session)
        _kill(first, runtime_dir)
        about = _set_format(runtime_dir, 99)
        with pytest.raises(VersionMismatch, match="format 99"):
            serve([HOST], runtime_dir, None, lambda *_: None)
        assert keepers(runtime_dir)
        _set_format(runtime_dir, about.format)
        with serving(runtime_dir):
            assert _facts(session) == before
            lease.release()


def _set_format(runtime_dir: Path, number: int) -> About:
    """Let the journal say that it is in another format; returns what it said."""
    with contextlib.closing(Journal(journal_path(runtime_dir / "host.sock"))) as journal:
        about = decode(journal.values["about/"], About)
        journal.append({"about/": encode(msgspec.structs.replace(about, format=number))})
    return about


def test_serve_goes_on_with_what_a_killed_one_has_left_when_it_comes_in_time(runtime_dir: Path) -> None:
    with serving(runtime_dir) as first, connect(socket_path=runtime_dir / "host.sock") as session:
        lease = publish(session, b"bytes")
        before = _facts(session)
        _kill(first, runtime_dir)
        with serving(runtime_dir, "--replace"):
            assert _facts(session) == before
            assert session.driver.read(lease.arena.base, 5) == b"bytes"
            lease.release()


@pytest.mark.parametrize("victims", ["gms serve", "gms serve and the device server"])
def test_memory_is_given_up_and_nothing_is_left_when_no_server_comes_back_in_time(runtime_dir: Path, victims: str) -> None:
    with serving(runtime_dir, "--keep", "0.5") as process, connect(socket_path=runtime_dir / "host.sock") as session:
        lease, driver = publish(session, b"bytes"), session.driver
        assert keepers(runtime_dir)
        device_server = os.pidfd_open(owner(runtime_dir / "host.sock"))
        began = time.monotonic()
        if victims == "gms serve":
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait(20) == -signal.SIGKILL
        else:
            _kill(process, runtime_dir)
        with pytest.raises(ConnectionLost):  # as soon as there is nothing to come back to
            session.status()
        assert 0.4 < time.monotonic() - began < 10
        assert select.select([device_server], [], [], 20)[0]
        os.close(device_server)
        assert driver.read(lease.arena.base, 5) == b"bytes", "what is mapped stays"
        lease.release()
        deadline = time.monotonic() + 10
        while keepers(runtime_dir):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (runtime_dir / "host.keep").exists()
    with serving(runtime_dir), connect(socket_path=runtime_dir / "host.sock") as session:
        assert session.status().allocations == 0
        lease = publish(session, b"bytes")
        assert lease.layout.generation == 2, "numbers go on"
        lease.release()


def _kill(process: subprocess.Popen[str], directory: Path) -> None:
    """Kill a `gms serve` and its device server, all at once as far as anybody can tell."""
    device_server = owner(directory / "host.sock")
    os.kill(device_server, signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(device_server, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL


def test_server_serves_when_nothing_is_to_be_kept_without_it(runtime_dir: Path) -> None:
    with serving(runtime_dir, "--keep", "0"), connect(socket_path=runtime_dir / "host.sock") as session:
        publish(session, b"bytes").release()


def test_no_keeper_is_left_when_a_server_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "host.journal").mkdir()
    command = [*GMS, "serve", "--device", "host", "--runtime-dir", str(runtime_dir)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode != 0
    assert "host.journal" in refused.stderr
    deadline = time.monotonic() + 10
    while keepers(runtime_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_client_does_not_wait_for_a_server_whose_keeper_was_killed(runtime_dir: Path) -> None:
    with serving(runtime_dir) as process:
        (keeper,) = keepers(runtime_dir)
        device_server = owner(runtime_dir / "host.sock")
        os.kill(device_server, signal.SIGSTOP)  # so that it does not start another one
        os.kill(keeper, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        os.kill(device_server, signal.SIGKILL)
        process.wait(20)
        began = time.monotonic()
        with pytest.raises(ServerUnavailable):
            connect(socket_path=runtime_dir / "host.sock")
        assert time.monotonic() - began < 5
        assert (runtime_dir / "host.keep").exists()


@pytest.mark.parametrize("seconds", ["-1", "soon"])
def test_serve_refuses_to_keep_memory_for_a_time_that_is_none(runtime_dir: Path, seconds: str) -> None:
    result = CliRunner().invoke(gms, ["serve", "--device", "host", "--runtime-dir", str(runtime_dir), "--keep", seconds])
    assert result.exit_code == ExitCode.USAGE
    assert "--keep" in result.stderr


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
        assert process.stdout is not None
        assert process.stdout.readline() == f"host ready at {runtime_dir}/host.sock\n"
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
