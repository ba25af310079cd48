"""Real vLLM engines on CPU whose two ranks are on two nodes, each with a device server of its own: a group stands in for a group."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from failover_story import ENVIRONMENT, Client, Running, Story, until
from models import write_model
from test_vllm_load import hide_weights

from tests.conftest import running_server
from tests.ports import free_port
from tests.unit.gms_run import gms_run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@dataclass
class Group:
    """One engine: its parts, by node."""

    parts: list[Running]

    @property
    def name(self) -> str:
        return self.parts[0].name

    def until_gone(self) -> None:
        for part in self.parts:
            part.until_gone()


@dataclass
class Nodes:
    """Two machines, as far as GMS can see."""

    stories: list[Story]
    secret: Path

    @contextlib.contextmanager
    def group(self, name: str, port: int, **failover: Any) -> Iterator[Group]:
        """Start an engine over both nodes, clients of which come to a port of the first one. It ends with the context."""
        meet, agents = free_port(), free_port()
        words = ("-tp", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(meet), "--distributed-executor-backend", "mp")
        block = {"nodes": {"secret_file": str(self.secret), "port": agents}, **failover}
        with contextlib.ExitStack() as stack:
            parts = [("--port", str(port), "--node-rank", "0"), ("--headless", "--node-rank", "1")]
            started = [
                stack.enter_context(story.engine(name, *words, *part, failover=block)) for story, part in zip(self.stories, parts, strict=True)
            ]
            yield Group(started)

    def until_role(self, group: Group, role: Any) -> None:
        self.stories[0].until_role(group.parts[0], role)

    def pid_of(self, group: Group, node: int, process: str) -> int:
        return self.stories[node].pid_of(group.parts[node], process)

    def engines(self) -> list[dict[str, str]]:
        """The engines that each node's server knows, and their roles."""
        return [{cohort.engine: cohort.role for cohort in story.status().cohorts} for story in self.stories]

    def until_engines(self, wanted: dict[str, str]) -> None:
        """Wait until every node's server knows these engines, and no others."""
        until(lambda: self.engines() == [wanted] * 2, f"the servers know other engines than {wanted}: {self.engines()}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """That of `stock_answers`, of which nobody else needs the files."""
    return write_model(tmp_path / "model", "llama")


@pytest.fixture
def nodes(model: Path, tmp_path: Path) -> Iterator[Nodes]:
    secret = tmp_path / "secret"
    secret.write_text(secrets.token_hex(16))
    secret.chmod(0o600)
    with contextlib.ExitStack() as stack:
        stories = []
        for number in range(2):
            folder = tmp_path / f"node-{number}"
            folder.mkdir()
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gms-")))
            stories.append(Story(stack.enter_context(running_server(directory)), model, folder))
        yield Nodes(stories, secret)


def test_next_group_serves_rightly_when_any_part_of_the_first_ends(nodes: Nodes, model: Path, stock_answers: list[list[str]]) -> None:
    port = free_port()
    client = Client(model, port)
    with contextlib.ExitStack() as stack:

        def start(name: str, **failover: Any) -> Group:
            return stack.enter_context(nodes.group(name, port, **failover))

        def killed(primary: Group, node: int, process: str, number: int = signal.SIGKILL) -> None:
            os.kill(nodes.pid_of(primary, node, process), number)

        primary = start("group-0")
        nodes.until_role(primary, "primary")
        assert client.tokens() == stock_answers[0]
        hide_weights(model)
        for count, (node, process, number) in enumerate(
            [(1, "rank 1", signal.SIGKILL), (1, "agent", signal.SIGKILL), (0, "api-server 0", signal.SIGKILL), (1, "rank 1", signal.SIGSTOP)]
        ):
            shadow = start(f"group-{count + 1}", deadline_s=4.0)
            nodes.until_role(shadow, "standby")
            nodes.until_engines({primary.name: "primary", shadow.name: "standby"})
            killed(primary, node, process, number)
            nodes.until_role(shadow, "primary")
            primary.until_gone()
            assert client.tokens() == stock_answers[0]
            nodes.until_engines({shadow.name: "primary"})
            primary = shadow
        os.kill(primary.parts[0].process.pid, signal.SIGTERM)
        primary.until_gone()
        assert [part.process.returncode for part in primary.parts] == [0, 0]
        nodes.until_engines({})


@pytest.mark.long
def test_group_comes_back_as_a_shadow_when_gms_run_keeps_it_on_each_node(nodes: Nodes, model: Path) -> None:
    port, (meet, agents) = free_port(), (free_port(), free_port())
    client = Client(model, port)
    place = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(meet), "--agents-port", str(agents), "--secret", str(nodes.secret))
    with contextlib.ExitStack() as stack:
        runs = []
        for number, story in enumerate(nodes.stories):
            command = ("vllm", *story.command[1:], "--port", str(port), "-tp", "2", "--distributed-executor-backend", "mp")
            block = '{"alias_bytes": 1048576}'
            variables = {**ENVIRONMENT, "GMS_CACHE_DIR": str(story.folder), "GMS_PLUGINS": "vllm", "GMS_FAILOVER": block, "PATH": PATH}
            runs.append(stack.enter_context(gms_run(story.server.directory, *place, "--node-rank", str(number), "--", *command, **variables)))
        nodes.until_engines({"engine-0": "primary", "engine-1": "standby"})
        right = client.tokens()
        ranks = {
            member.process: member.pid for cohort in nodes.stories[1].status().cohorts for member in cohort.members if cohort.engine == "engine-0"
        }
        os.kill(ranks["rank 1"], signal.SIGKILL)
        nodes.until_engines({"engine-0": "standby", "engine-1": "primary"})
        assert client.tokens() == right
        for run in reversed(runs):
            run.interrupt()
        assert [run.wait() for run in runs] == [0, 0]
        nodes.until_engines({})
