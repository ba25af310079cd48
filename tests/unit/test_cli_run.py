"""``gms run`` with real processes: engines that elect a primary, and are killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode
from gms_core.cli.run import _failover
from gms_core.client import connect
from gms_core.config import child_environment
from gms_core.errors import EngineFailed, ServerUnavailable
from gms_core.fleet.restarts import Policy
from gms_core.fleet.supervisor import Wanted, supervise
from gms_core.fleet.view import Change
from tests.conftest import RunningServer, lose_everything, owner
from tests.ports import free_port
from tests.unit.gms_run import ENGINE, GMS, PATIENCE_S, answer, gms_run, processes_of


def _members(directory: Path, engine: str) -> dict[str, int]:
    """Processes of an engine by what they are."""
    result = CliRunner().invoke(gms, ["failover", "status", "--runtime-dir", str(directory), "-o", "json"])
    (found,) = [status for status in json.loads(result.stdout)["engines"] if status["name"] == engine]
    return {member["process"]: member["pid"] for member in found["members"]}


def _engines(directory: Path) -> list[tuple[str, str, list[int]]]:
    """Engines as `gms failover status` shows them: name, role, processes."""
    result = CliRunner().invoke(gms, ["failover", "status", "--runtime-dir", str(directory), "-o", "json"])
    found = json.loads(result.stdout)["engines"]
    return sorted((engine["name"], engine["role"], sorted(member["pid"] for member in engine["members"])) for engine in found)


def _serve(directory: Path) -> int:
    """The `gms serve` that `gms run` has started."""
    return next(pid for pid in processes_of(directory) if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))


def _answers(socket: Path) -> bool:
    try:
        connect(socket_path=socket).close()
    except ServerUnavailable:
        return False
    return True


@pytest.mark.parametrize("victim", ["its first process", "its rank", "its whole group"])
def test_shadow_takes_over_and_the_dead_comes_back_when_the_primary_is_killed(runtime_dir: Path, victim: str) -> None:
    port = free_port()
    with gms_run(runtime_dir, "--device", "host", "--", *ENGINE, "--port", str(port)) as run:
        run.wait_for("engine-0", "primary", lambda event: event["epoch"] == 1)
        run.wait_for("engine-1", "standby")
        name, pid, epoch = answer(port)
        assert (name, epoch) == ("engine-0", "1")
        if victim == "its whole group":
            os.killpg(int(pid), signal.SIGKILL)
        else:
            os.kill(int(pid) if victim == "its first process" else _members(runtime_dir, "engine-0")["rank 0"], signal.SIGKILL)
        run.wait_for("engine-1", "primary", lambda event: event["epoch"] == 2)
        back = run.wait_for("engine-0", "standby")
        assert back["restarts"] == 1
        assert back["pid"] != int(pid)
        assert answer(port)[::2] == ["engine-1", "2"]
        run.interrupt()
        assert run.wait() == 0
    states = [(event["subject"], event["state"]) for event in run.events]
    assert states.index(("engine-0", "ended")) < states.index(("engine-1", "ended")) < states.index(("server", "ended"))
    assert run.told("server") == ["starting", "up", "ended"]
    assert not (runtime_dir / "host.sock").exists()


def test_log_of_each_engine_has_a_line_for_each_start_when_it_was_started_again(runtime_dir: Path) -> None:
    with gms_run(runtime_dir, "--device", "host", "--shadows", "0", "--name", "toy", "--", *ENGINE, "--port", "0") as run:
        for _ in range(2):
            os.kill(run.wait_for("toy-0", "primary")["pid"], signal.SIGKILL)
        run.wait_for("toy-0", "primary")
        run.interrupt()
        assert run.wait() == 0
    starts = [line for line in (runtime_dir / "logs" / "toy-0.log").read_text().splitlines() if line.startswith("--- ")]
    assert [line.partition(" start ")[2].partition(":")[0] for line in starts] == ["1 of toy-0", "2 of toy-0", "3 of toy-0"]
    assert (runtime_dir / "logs").stat().st_mode & 0o777 == 0o700


def test_reason_of_the_server_is_told_when_it_has_ended_an_engine(runtime_dir: Path) -> None:
    with gms_run(runtime_dir, "--device", "host", "--shadows", "0", "--", *ENGINE) as run:
        run.wait_for("engine-0", "primary")
        os.kill(_members(runtime_dir, "engine-0")["rank 0"], signal.SIGKILL)
        event = run.wait_for("engine-0", "waiting", lambda event: "rank 0" in event["detail"])
        assert event["detail"].endswith(f"log: {runtime_dir}/logs/engine-0.log")
        run.interrupt()
        assert run.wait() == 0


def test_server_is_used_and_left_running_when_one_runs_already(server: RunningServer) -> None:
    with gms_run(server.directory, "--shadows", "0", "--no-serve", "--", *ENGINE) as run:
        run.wait_for("engine-0", "primary")
        run.interrupt()
        assert run.wait() == 0
    assert run.told("server") == ["up"]
    with server.connect() as session:
        assert session.status().cohorts == ()


def test_server_is_started_again_when_it_was_killed(runtime_dir: Path) -> None:
    port = free_port()
    with gms_run(runtime_dir, "--device", "host", "--shadows", "0", "--", *ENGINE, "--port", str(port)) as run:
        run.wait_for("engine-0", "primary")
        os.kill(_serve(runtime_dir), signal.SIGKILL)
        run.wait_for("server", "ended")
        run.wait_for("server", "starting")
        run.wait_for("server", "up")
        assert answer(port)[0] == "engine-0", "a primary serves without its server"
        run.interrupt()
        assert run.wait() == 0


@pytest.mark.parametrize("victim", ["device server", "gms serve"])
def test_no_engine_is_started_again_when_a_server_was_killed_and_the_shadow_takes_over_later(runtime_dir: Path, victim: str) -> None:
    port, socket = free_port(), runtime_dir / "host.sock"
    with gms_run(runtime_dir, "--device", "host", "--", *ENGINE, "--port", str(port)) as run:
        first = run.wait_for("engine-0", "primary")["pid"]
        run.wait_for("engine-1", "standby")
        before = _engines(runtime_dir)
        for _ in range(2):
            killed = owner(socket)
            os.kill(killed if victim == "device server" else _serve(runtime_dir), signal.SIGKILL)
            while not _answers(socket) or owner(socket) == killed:
                time.sleep(0.02)
            assert answer(port) == ["engine-0", str(first), "1"]
        assert _engines(runtime_dir) == before
        os.killpg(first, signal.SIGKILL)
        run.wait_for("engine-1", "primary", lambda event: event["epoch"] == 2)
        run.wait_for("engine-0", "standby")
        name, _, epoch = answer(port)
        assert (name, epoch) == ("engine-1", "2")
        with connect(socket_path=socket) as session:
            (lock,) = session.status().locks
        assert lock.term == 2
        run.interrupt()
        assert run.wait() == 0
    starts = [event["subject"] for event in run.events if event["state"] == "starting"]
    assert [starts.count(name) for name in ("engine-0", "engine-1")] == [2, 1]


def test_run_ends_when_it_is_told_to_while_its_server_hangs(server: RunningServer) -> None:
    with gms_run(server.directory, "--shadows", "0", "--stop-timeout", "0.5", "--", *ENGINE) as run:
        run.wait_for("engine-0", "primary")
        hanging = server.pid
        os.kill(hanging, signal.SIGSTOP)
        try:
            run.wait_for("server", "lost")
            run.interrupt()
            assert run.wait() == 0
        finally:
            os.kill(hanging, signal.SIGCONT)
    assert run.told("engine-0")[-3:] == ["primary", "ending", "ended"], "what was known stays while the server does not answer"


def test_second_run_stands_by_with_other_names_when_the_first_was_killed(runtime_dir: Path) -> None:
    port = free_port()
    arguments = ("--device", "host", "--shadows", "0", "--", *ENGINE, "--port", str(port))
    with gms_run(runtime_dir, *arguments) as first:
        first.wait_for("engine-0", "primary")
        first.process.kill()
        first.process.wait(PATIENCE_S)
        with gms_run(runtime_dir, *arguments) as second:
            second.wait_for("engine-1", "standby")
            name, pid, _ = answer(port)
            assert name == "engine-0", "engines outlive a run that was killed"
            os.killpg(int(pid), signal.SIGKILL)
            second.wait_for("engine-1", "primary", lambda event: event["epoch"] == 2)
            second.interrupt()
            assert second.wait() == 0
            with connect(socket_path=runtime_dir / "host.sock") as session:
                assert session.status().cohorts == (), "the server is the first run's, and lives on"
            for left in processes_of(runtime_dir):
                if b"serve" in Path(f"/proc/{left}/cmdline").read_bytes().split(b"\0"):
                    os.kill(left, signal.SIGTERM)
            while processes_of(runtime_dir):
                pass


def test_engine_is_killed_when_it_does_not_end_in_time(runtime_dir: Path) -> None:
    with gms_run(runtime_dir, "--device", "host", "--shadows", "1", "--stop-timeout", "0.2", "--", *ENGINE, "--ignores-sigterm") as run:
        run.wait_for("engine-1", "standby")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0
    assert run.events[-2]["detail"].startswith("was ended by signal SIGKILL")


def test_engines_are_killed_at_once_when_ctrl_c_comes_again(runtime_dir: Path) -> None:
    with gms_run(runtime_dir, "--device", "host", "--stop-timeout", "3600", "--", *ENGINE, "--ignores-sigterm") as run:
        run.wait_for("engine-1", "standby")
        run.interrupt()
        run.wait_for("engine-1", "ending")
        run.interrupt()
        assert run.wait() == 0
    assert run.told("server")[-1] == "ended"


def test_primary_serves_on_when_neither_a_shadow_nor_the_server_can_be_started(runtime_dir: Path) -> None:
    port, logs = free_port(), runtime_dir / "logs"
    with gms_run(runtime_dir, "--device", "host", "--", *ENGINE, "--port", str(port)) as run:
        run.wait_for("engine-0", "primary")
        shadow = run.wait_for("engine-1", "standby")
        logs.rename(runtime_dir / "away")
        os.killpg(shadow["pid"], signal.SIGKILL)
        run.wait_for("engine-1", "waiting", lambda event: "was not started" in event["detail"])
        logs.mkdir()
        run.wait_for("engine-1", "standby")
        assert answer(port)[0] == "engine-0"
        logs.rename(runtime_dir / "away too")
        os.kill(_serve(runtime_dir), signal.SIGKILL)
        run.wait_for("server", "ended", lambda event: "cannot be written" in event["detail"])
        assert answer(port)[0] == "engine-0"
        logs.mkdir()
        run.wait_for("server", "up")
        run.interrupt()
        assert run.wait() == 0


@pytest.fixture
def in_vain(server: RunningServer, tmp_path: Path) -> Wanted:
    """Two engines whose command a test has to name, and which are given up after three starts."""
    return Wanted(
        command=lambda number: [],
        environment=lambda number: child_environment(),
        name="engine",
        engines=2,
        lock="gms:primary",
        runtime_dir=server.directory,
        devices=(),
        serve=None,
        log_dir=tmp_path,
        policy=Policy(first_delay_s=0.01, most_failures=3),
        stop_timeout_s=10.0,
    )


def test_run_gives_up_when_no_engine_can_be_started(in_vain: Wanted, tmp_path: Path) -> None:
    wanted = replace(in_vain, command=lambda number: [str(tmp_path / "absent")])
    with pytest.raises(
        EngineFailed, match=r"3 starts in a row have failed and no engine serves; engine-0 was not started: .*absent cannot be started"
    ):
        supervise(wanted, lambda change: None, lambda rows: None)


@pytest.mark.parametrize("role", ["init", "promoting"])
def test_run_gives_up_when_engines_die_again_and_again(server: RunningServer, in_vain: Wanted, tmp_path: Path, role: str) -> None:
    told: list[Change] = []
    variables = {"GMS_RUNTIME_DIR": str(server.directory), "GMS_FAILOVER": "{}"}
    wanted = replace(
        in_vain,
        command=lambda number: [*ENGINE, "--dies-as", role],
        environment=lambda number: child_environment(**variables, GMS_ENGINE=f"engine-{number}"),
    )
    with pytest.raises(EngineFailed, match="3 starts in a row have failed") as caught:
        supervise(wanted, told.append, lambda rows: None)
    assert str(tmp_path / "engine-0.log") in caught.value.hint
    assert f"dies as {role}" in caught.value.hint
    assert not [change for change in told if change.subject == "engine-1" and change.state == "starting"]


def test_run_says_why_when_its_server_cannot_start(server: RunningServer, in_vain: Wanted, tmp_path: Path) -> None:
    wanted = replace(
        in_vain,
        engines=1,
        devices=("GPU-0",),
        serve=(*GMS, "serve", "--runtime-dir", str(server.directory), "--device", "GPU-0"),
        policy=Policy(),
        stop_timeout_s=1.0,
    )
    with pytest.raises(ServerUnavailable, match="exited with code 9 as soon as it was started: hint:"):
        supervise(wanted, lambda change: None, lambda rows: None)


def test_engine_is_started_again_when_it_hangs_while_it_starts(runtime_dir: Path) -> None:
    options = ("--device", "host", "--shadows", "0", "--start-timeout", "3")
    with gms_run(runtime_dir, *options, "--", *ENGINE, "--hangs-as", "init") as run:
        run.wait_for("engine-0", "ending", lambda event: event["detail"] == "it was not ready within 3 s")
        run.wait_for("engine-0", "waiting", lambda event: "not ready" in event["detail"])
        assert run.wait_for("engine-0", "starting")["restarts"] == 1
        run.interrupt()
        assert run.wait() == 0


def test_shadow_is_started_again_when_it_hangs_after_the_loss_of_its_server_and_keeper(runtime_dir: Path) -> None:
    with gms_run(runtime_dir, "--device", "host", "--", *ENGINE, "--hangs-without-server") as run:
        run.wait_for("engine-0", "primary")
        run.wait_for("engine-1", "standby")
        lose_everything(runtime_dir / "host.sock")
        run.wait_for("engine-1", "ending", lambda event: event["detail"] == "its server does not know it any more")
        assert run.wait_for("engine-1", "starting")["restarts"] == 1
        run.interrupt()
        assert run.wait() == 0


def test_run_says_so_at_once_when_the_command_line_is_wrong(server: RunningServer) -> None:
    result = CliRunner().invoke(gms, ["run", "--runtime-dir", str(server.directory), "--", *ENGINE, "--port", "eight"])
    assert result.exit_code == ExitCode.FAILOVER
    assert "gms: engine-0 exited with code 2, as programs do whose command line is wrong" in result.stderr
    assert "invalid int value: 'eight'" in result.stderr


def test_command_is_given_up_when_it_never_works_beside_a_primary_of_another_device(server: RunningServer, in_vain: Wanted) -> None:
    with gms_run(server.directory, "--shadows", "0", "--", *ENGINE) as other:
        other.wait_for("engine-0", "primary")
        wanted = replace(in_vain, command=lambda number: ["false"], name="broken", engines=1)
        with pytest.raises(EngineFailed, match="3 starts in a row have failed"):
            supervise(wanted, lambda change: None, lambda rows: None)
        other.interrupt()
        assert other.wait() == 0


def test_run_warns_when_no_adapter_knows_the_command(runtime_dir: Path) -> None:
    with gms_run(runtime_dir, "--device", "host", "--shadows", "0", "--", *ENGINE) as run:
        run.wait_for("engine-0", "primary")
        run.interrupt()
        assert run.wait() == 0
        assert run.stderr().startswith("gms: the command is of no engine that an adapter knows")


def test_number_stands_in_the_command_when_each_engine_has_its_own_port(runtime_dir: Path) -> None:
    options = ("--device", "host", "--gate", "503", "--status-address", "127.0.0.1:900{n}")
    with gms_run(runtime_dir, *options, "--", *ENGINE, "--port", "0", "--dies-as", "none-{n}") as run:
        run.wait_for("engine-1", "standby")
        run.interrupt()
        assert run.wait() == 0
    for number in (0, 1):
        log = (runtime_dir / "logs" / f"engine-{number}.log").read_text()
        assert f"--dies-as none-{number}" in log
        assert f'"status_address":"127.0.0.1:900{number}"' in log


VLLM = """#!{python}
import json, os, sys, time
print("started with", sys.argv[1:], json.loads(os.environ["GMS_FAILOVER"]), flush=True)
time.sleep(3600)
"""


def test_vllm_gets_its_load_format_and_its_block_when_it_is_run(runtime_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "vllm"
    script.write_text(VLLM.format(python=sys.executable))
    script.chmod(0o755)
    block = {"lock": "gms:other", "promotion_timeout_s": 5.0}
    options = ("--device", "host", "--shadows", "0", "--lock", "gms:this", "--on-promoted", "tell 'the balancer'", "--webhook", "http://localhost/x")
    environment = {"GMS_PLUGINS": "vllm", "PATH": f"{tmp_path}:{os.environ['PATH']}", "GMS_FAILOVER": json.dumps(block)}
    log = runtime_dir / "logs" / "engine-0.log"
    with gms_run(runtime_dir, *options, "--", "vllm", "serve", "MODEL", **environment) as run:
        run.wait_for("engine-0", "starting")
        while "started with" not in log.read_text():
            pass
        run.interrupt()
        assert run.wait() == 0
    told = {"lock": "gms:this", "promotion_timeout_s": 5.0, "on_promoted": ["tell", "the balancer"], "webhook": "http://localhost/x"}
    assert f"started with {['serve', 'MODEL', '--load-format', 'gms']} " in log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("started with")]
    assert eval(line.partition("] ")[2]) == told


@pytest.mark.parametrize(("node", "more"), [(0, []), (1, ["--headless"])])
def test_each_engine_meets_at_ports_of_its_own_when_there_are_several_nodes(runtime_dir: Path, tmp_path: Path, node: int, more: list[str]) -> None:
    script = tmp_path / "vllm"
    script.write_text(VLLM.format(python=sys.executable))
    script.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    numbers = ("--nnodes", "2", "--node-rank", str(node), "--master-addr", "10.0.0.1", "--secret", str(secret))
    environment = {"GMS_PLUGINS": "vllm", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with gms_run(runtime_dir, "--device", "host", "--shadows", "2", *numbers, "--", "vllm", "serve", "MODEL", **environment) as run:
        # The first node starts one engine after the other, the others follow: their parts of all engines wait for that.
        for number in range(1 if node == 0 else 3):
            log = runtime_dir / "logs" / f"engine-{number}.log"
            run.wait_for(f"engine-{number}", "starting")
            while "started with" not in log.read_text():
                pass
            (line,) = [line for line in log.read_text().splitlines() if line.startswith("started with")]
            place = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "10.0.0.1", "--master-port", str(29500 + number)]
            assert f"started with {['serve', 'MODEL', '--load-format', 'gms', *place, *more]} " in line
            assert eval(line.partition("] ")[2])["nodes"] == {"secret_file": str(secret), "port": 29600 + number}
        run.interrupt()
        assert run.wait() == 0


def _refused(directory: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(gms, ["run", "--runtime-dir", str(directory), *arguments])
    return result.exit_code, result.stderr


NODES = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--secret", "{secret}")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--device", "host", "--", "no-such-engine"], ExitCode.USAGE, "there is no command 'no-such-engine'"),
        (["--gate", "503", "--", "true"], ExitCode.USAGE, "--port 800{n}"),
        (["--status-address", "127.0.0.1:9000", "--", "true"], ExitCode.USAGE, "--status-address 127.0.0.1:900{n}"),
        (["--status-address", "{n}", "--", "true"], ExitCode.USAGE, "status_address: must be HOST:PORT"),
        (["--name", "../engine", "--", "true"], ExitCode.USAGE, "'../engine' cannot be the name of engines"),
        (["--no-serve", "--device", "host", "--", "true"], ExitCode.NO_SERVER, "for host\nhint: Start it with gms serve"),
        (["--lock", "etcd:x", "--", "true"], ExitCode.USAGE, "the options of gms run: lock: must be etcd://HOST:PORT"),
        (["--lock", "zk:x", "--", "true"], ExitCode.USAGE, "lock: must be gms:NAME, flock:/ABSOLUTE/PATH, etcd://... or k8s:..."),
        (["--lock", "flock:/no/such/lock", "--", "true"], ExitCode.USAGE, "the lock file /no/such/lock cannot be opened: No such file or directory"),
        (["--lock", "flock:/etc/passwd/lock", "--", "true"], ExitCode.USAGE, "/etc/passwd/lock cannot be opened: Not a directory"),
        (
            ["--webhook", "ftp://x/s3cret", "--", "true"],
            ExitCode.USAGE,
            "webhook: must begin with http:// or https://\nhint: The options are --lock, --gate, --on-promoted, --webhook, --status-address.\n",
        ),
        (["--on-promoted", "echo 'x", "--", "true"], ExitCode.USAGE, "--on-promoted cannot be read as a command"),
        (["--", "vllm", "serve", "MODEL", "--load-format", "dummy"], ExitCode.USAGE, "--load-format dummy does not share weights"),
        (["--", "true"], ExitCode.NO_DEVICE, "gms run --device host"),
        (["--device", "hots", "--", "true"], ExitCode.USAGE, "'hots' is no device\nhint: Name host, or a GPU by the UUID"),
        (["--shadows", "1"], ExitCode.USAGE, "COMMAND"),
        (["--shadow", "1", "--", "true"], ExitCode.USAGE, "--shadows"),
        (["--log-dir", "/proc/no", "--device", "host", "--", "true"], ExitCode.USAGE, "no file can be made in the directory of logs /proc/no"),
        (["--log-dir", "/proc", "--device", "host", "--", "true"], ExitCode.USAGE, "no file can be made in the directory of logs /proc"),
        (["--node-rank", "1", "--", "vllm", "serve", "MODEL"], ExitCode.USAGE, "--node-rank is for engines over several nodes\nhint: Say how many"),
        (["--nnodes", "2", "--", "vllm", "serve", "MODEL"], ExitCode.USAGE, "--nnodes 2 needs --node-rank"),
        ([*NODES, "--node-rank", "2", "--", "vllm", "serve", "MODEL"], ExitCode.USAGE, "--node-rank 2: the nodes are 0 to 1"),
        ([*NODES, "--secret", "/no/file", "--", "vllm", "serve", "MODEL"], ExitCode.USAGE, "the secret /no/file cannot be read: No such file"),
        ([*NODES, "--master-port", "29590", "--", "vllm", "serve", "MODEL"], ExitCode.USAGE, "65 engines need that many ports each"),
        ([*NODES, "--agents-port", "65500", "--", "vllm", "serve", "MODEL"], ExitCode.USAGE, "65 engines need that many ports each"),
        (["--device", "host", *NODES, "--", "true"], ExitCode.USAGE, "--nnodes: this command starts no engine that fails over over several nodes"),
        (["--device", "host", *NODES, "--", "vllm", "serve", "MODEL", "--node-rank", "1"], ExitCode.USAGE, "the command says --node-rank itself"),
    ],
)
def test_run_refuses_with_a_sentence_when_it_cannot_begin(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: ExitCode, words: str
) -> None:
    (tmp_path / "vllm").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("GMS_PLUGINS", "vllm")
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    found, said = _refused(runtime_dir, *(word.replace("{secret}", str(secret)) for word in arguments))
    assert (found, words in said) == (code, True), said


def test_variable_is_named_when_its_block_is_wrong(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_FAILOVER", '{"gate": "door"}')
    code, said = _refused(runtime_dir, "--", "true")
    assert code == ExitCode.USAGE
    assert said.startswith("gms: GMS_FAILOVER: gate:")


def test_variable_keeps_its_values_when_options_stand_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_FAILOVER", '{"gate": "503", "lock": "gms:other", "deadline_s": 3}')
    block = _failover({"lock": "gms:this", "on_promoted": None, "status_address": "127.0.0.1:900{n}"}, 1)
    assert json.loads(block.model_dump_json(exclude_unset=True)) == {
        "gate": "503",
        "lock": "gms:this",
        "deadline_s": 3.0,
        "status_address": "127.0.0.1:9001",
    }


def test_nobody_is_blamed_for_an_option_that_only_the_variable_has(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_FAILOVER", '{"gate": "503"}')
    code, said = _refused(runtime_dir, "--", "true")
    assert code == ExitCode.USAGE
    assert said.startswith("gms: with the gate 503 every engine listens")


def test_changes_are_lines_of_text_when_standard_output_is_no_terminal(server: RunningServer) -> None:
    command = [*GMS, "run", "--runtime-dir", str(server.directory), "--shadows", "0", "--", *ENGINE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment(GMS_PLUGINS="")) as run:
        assert run.stdout is not None
        lines = []
        while "primary" not in (lines[-1] if lines else ""):
            lines.append(run.stdout.readline())
        run.send_signal(signal.SIGINT)
        lines += run.stdout.readlines()
        assert run.wait(PATIENCE_S) == 0
    words = [line.split(" ", 1)[1].partition(" (")[0].strip() for line in lines]
    assert words[:2] == ["server up", "engine-0 starting"]
    assert [word for word in words if "primary" in word] == ["engine-0 primary"]
    assert words[-3:] == ["run ending", "engine-0 ending", "engine-0 ended"]


def test_table_shows_who_serves_when_standard_output_is_a_terminal(server: RunningServer) -> None:
    master, slave = pty.openpty()
    command = [*GMS, "run", "--runtime-dir", str(server.directory), "--shadows", "0", "--", *ENGINE]
    environment = child_environment(GMS_PLUGINS="", TERM="xterm", COLUMNS="120", LINES="40")
    with subprocess.Popen(command, stdout=slave, stdin=subprocess.DEVNULL, env=environment) as run:
        os.close(slave)
        shown = b""
        while b"primary" not in shown:
            shown += os.read(master, 4096)
        run.send_signal(signal.SIGINT)
        while b"ended" not in shown:
            shown += os.read(master, 4096)
        assert run.wait(PATIENCE_S) == 0
    os.close(master)
    assert b"restarts" in shown
    assert b"engine-0" in shown


TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("output", ["table", "lines", "json"])
def test_engines_and_server_end_in_order_when_the_terminal_is_closed(runtime_dir: Path, output: str) -> None:
    master, slave = pty.openpty()
    options = ("--runtime-dir", str(runtime_dir), "--device", "host", "--shadows", "0", "-o", output)
    command = [sys.executable, "-c", TERMINAL, *GMS, "run", *options, "--", *ENGINE]
    environment = child_environment(GMS_PLUGINS="", TERM="xterm", COLUMNS="120", LINES="40")
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True) as run:
        os.close(slave)
        shown = b""
        while b"primary" not in shown:
            shown += os.read(master, 4096)
        os.close(master)
        assert run.wait(PATIENCE_S) == 0
    assert processes_of(runtime_dir) == []
    assert "engine-0 has ended" in (runtime_dir / "logs" / "engine-0.log").read_text()


def test_engines_live_on_when_the_disk_of_the_output_is_full(runtime_dir: Path) -> None:
    command = [*GMS, "run", "--runtime-dir", str(runtime_dir), "--device", "host", "--shadows", "0", "-o", "lines", "--", *ENGINE]
    log = runtime_dir / "logs" / "engine-0.log"
    with Path("/dev/full").open("wb") as full, subprocess.Popen(command, stdout=full, env=child_environment(GMS_PLUGINS="")) as run:
        while not log.exists() or "serves" not in log.read_text():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.wait(PATIENCE_S) == 0
    assert "engine-0 has ended" in log.read_text()
    assert processes_of(runtime_dir) == []


def test_run_uses_no_time_when_it_waits_for_an_engine_that_ends_slowly(runtime_dir: Path) -> None:
    options = ("--device", "host", "--shadows", "0", "--stop-timeout", "2")
    with gms_run(runtime_dir, *options, "--", *ENGINE, "--ignores-sigterm") as run:
        run.wait_for("engine-0", "primary")
        run.interrupt()
        run.wait_for("engine-0", "ending")
        before = _cpu_s(run.process.pid)
        time.sleep(1.5)
        used = _cpu_s(run.process.pid) - before
        assert run.wait() == 0
    assert used < 0.9, "it looks 20 times a second"


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
