"""An engine over several nodes ends as a whole: agents, parts and ranks are processes that are killed, with a real server for each node."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningServer, running_server
from tests.ports import free_port
from tests.unit.failover_processes import Told, told_processes
from tests.unit.publishing import until

PATIENCE_S = 60
RANK = """
import sys, threading
from pathlib import Path
from gms_core.failover.cohort import take_place
from gms_core.failover.nodes.part import join_agent
from gms_core.failover.parent_death import end_with_parent

take_place("rank", [Path(sys.argv[1])], serves=False, connect_timeout_s=10.0)
join_agent(Path(sys.argv[1]), 10.0)
print("joined", flush=True)
sys.stdin.read()
"""
PART = """
import json, os, subprocess, sys, threading
from pathlib import Path
from gms_core.failover.cohort import take_place
from gms_core.engine_config import NodesConfig
from gms_core.failover.nodes.part import begin_part, begun_part

guard = threading.Lock()
def say(**facts):
    with guard:
        print(json.dumps(facts), flush=True)

options = json.loads(sys.argv[1])
served, socket = options.pop("server"), options.pop("joins", True)
config = NodesConfig(**{name: options.pop(name) for name in NodesConfig.model_fields})
begin_part(config, **options)
part = begun_part()
rank = None
if socket:
    rank = subprocess.Popen([sys.executable, "-c", options_rank(), served], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    rank.stdout.readline()
    take_place("front end", [Path(served)], serves=False, connect_timeout_s=10.0)
say(begun=True, pid=os.getpid(), rank=rank.pid if rank else 0, agent=part.agent_pid)
def gather():
    part.until_gathered()
    say(gathered=True)
threading.Thread(target=gather, daemon=True).start()
def end():
    rank.stdin.close()
    rank.wait()
    say(ended=True)
    os._exit(0)
import signal
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end).start())
for line in sys.stdin:
    if line.startswith("stands "):
        part.stands(line.split()[1], "as the test says")
    if line.strip() == "depart":
        part.depart(20.0)
        end()
""".replace("options_rank()", repr(RANK))
PROCESSES = ("pid", "rank", "agent")


class Engine:
    """Its parts, by node."""

    def __init__(self, parts: list[Told], facts: list[dict[str, Any]]) -> None:
        self.parts, self._facts = parts, facts

    def pid(self, node: int, process: str) -> int:
        return int(self._facts[node][process])

    @property
    def left(self) -> list[int]:
        """Processes that are there still."""
        return [facts[name] for facts in self._facts for name in PROCESSES if facts[name] and is_there(facts[name])]


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def servers() -> Iterator[list[RunningServer]]:
    """Of three nodes."""
    with contextlib.ExitStack() as stack:
        directories = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gms-"))) for _ in range(3)]
        yield [stack.enter_context(running_server(directory)) for directory in directories]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(secrets.token_hex(16))
    file.chmod(0o600)
    return file


Begin = Callable[..., Told]


@pytest.fixture
def begin(servers: list[RunningServer], secret: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Begins a node's part of an engine."""
    port = free_port()
    with told_processes() as start:

        def part(node: int, nodes: int = 2, *, engine: str = "engine-0", **options: Any) -> Told:
            monkeypatch.setenv("GMS_COHORT", secrets.token_hex(16))
            monkeypatch.setenv("GMS_ENGINE", engine)
            usual = {"host": "127.0.0.1", "port": port, "secret_file": str(secret), "patience_s": 30.0, "timeout_s": 2.0}
            told = {**usual, "node": node, "nodes": nodes, "server": str(servers[node].socket), **options}
            return start(PART, json.dumps(told))

        yield part


def gathered(*parts: Told) -> Engine:
    facts = [part.until(begun=True) for part in parts]
    for part in parts:
        part.until(gathered=True)
    return Engine(list(parts), facts)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("node", [0, 1, 2])
def test_all_nodes_end_when_any_process_of_an_engine_is_killed(begin: Begin, servers: list[RunningServer], node: int, process: str) -> None:
    engine = gathered(*(begin(number, 3) for number in range(3)))
    assert len(engine.left) == 9
    os.kill(engine.pid(node, process), signal.SIGKILL)
    until(lambda: not engine.left, patience_s=PATIENCE_S)
    for server in servers:
        with server.connect() as session:
            until(lambda session=session: not session.status().cohorts, patience_s=PATIENCE_S)


def test_all_nodes_end_when_an_agent_hangs(begin: Begin) -> None:
    engine = gathered(begin(0), begin(1))
    os.kill(engine.pid(1, "agent"), signal.SIGSTOP)
    until(lambda: not engine.left, patience_s=PATIENCE_S)


def test_all_nodes_end_in_order_when_the_engine_departs(begin: Begin, capfd: pytest.CaptureFixture[str]) -> None:
    engine = gathered(begin(0), begin(1))
    engine.parts[0].tell("depart")
    for part in engine.parts:
        part.until_key("ended")
        assert part.wait() == 0
    until(lambda: not engine.left, patience_s=PATIENCE_S)
    assert "is ended" not in capfd.readouterr().err


def test_servers_of_all_nodes_know_the_role_when_the_engine_says_it(begin: Begin, servers: list[RunningServer]) -> None:
    engine = gathered(*(begin(number, 3) for number in range(3)))
    for role in ("standby", "promoting", "primary"):
        engine.parts[0].tell(f"stands {role}")
    for server in servers[1:]:
        with server.connect() as session:
            until(lambda session=session: [cohort.role for cohort in session.status().cohorts] == ["primary"], patience_s=PATIENCE_S)


def test_engines_do_not_mind_each_other_and_strangers(begin: Begin) -> None:
    others = free_port()
    first = gathered(begin(0), begin(1))
    second = gathered(begin(0, engine="engine-1", port=others), begin(1, engine="engine-1", port=others))
    with socket.create_connection(("127.0.0.1", others)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" + bytes(64))
        stranger.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    first.parts[0].kill()
    until(lambda: not first.left, patience_s=PATIENCE_S)
    assert len(second.left) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"node": 1, "nodes": 3}, "the agent of node 0 refuses node 1: engine-0 has 2 nodes, not 3"),
        ({"node": 1, "engine": "engine-1"}, "the agent of node 0 refuses node 1: this is the agent of engine-0, not of engine-1"),
        ({"node": 2, "nodes": 2}, "the agent of node 0 refuses node 2: there is no node 2"),
    ],
)
def test_part_ends_and_the_engine_goes_on_when_it_is_not_of_it(
    begin: Begin, capfd: pytest.CaptureFixture[str], options: dict[str, Any], sentence: str
) -> None:
    engine = gathered(begin(0), begin(1))
    wrong = begin(**options)
    assert wrong.wait() == -signal.SIGKILL
    assert sentence in capfd.readouterr().err
    assert len(engine.left) == 6


def test_part_ends_when_its_secret_is_another(begin: Begin, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(16))
    other.chmod(0o600)
    parts = [begin(0, patience_s=4.0), begin(1, patience_s=4.0, secret_file=str(other))]
    for part in parts:
        assert part.wait() == -signal.SIGKILL
    told = capfd.readouterr().err
    assert "does not know the secret" in told
    assert "is its secret the same?" in told


def test_part_ends_when_another_node_never_comes(begin: Begin, capfd: pytest.CaptureFixture[str]) -> None:
    parts = [begin(0, 3, patience_s=3.0), begin(1, 3, patience_s=60.0)]
    for part in parts:
        assert part.wait() == -signal.SIGKILL
    assert "nothing was heard of node 2 within 3 s" in capfd.readouterr().err


def test_part_ends_when_its_agent_cannot_listen(begin: Begin, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        part = begin(0, port=taken.getsockname()[1])
        assert part.wait() == -signal.SIGKILL
    assert "the agent cannot listen at 127.0.0.1" in capfd.readouterr().err


def test_agent_ends_when_its_part_is_killed_before_any_rank_has_joined(begin: Begin) -> None:
    part = begin(0, joins=False)
    agent = part.until_key("agent")
    part.kill()
    until(lambda: not is_there(agent), patience_s=PATIENCE_S)
