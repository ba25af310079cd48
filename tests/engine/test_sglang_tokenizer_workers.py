"""Real SGLang engines with several tokenizer workers: held together, promoted once, and ended as soon as one process of them is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from failover_story import Client, Running, until
from sglang_story import SglangStory, Streamed

from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

SEVERAL = ("--tokenizer-worker-num", "2")
WHOLE = ["api-server 0", "api-server 1", "detokenizer", "main", "rank 0"]
ENOUGH = 12
"""Connections, so many that each worker should get some; which of them it gets is the kernel's choice."""


@pytest.fixture
def story(server: Any, failover_model: Path, tmp_path: Path) -> SglangStory:
    """Engines of that model on one server."""
    return SglangStory(server, failover_model, tmp_path)


@pytest.fixture
def start(story: SglangStory) -> Iterator[Callable[..., Running]]:
    """Starts an engine at a port, with these keys of its failover block. Two of them come to their gates in less than two minutes, on two cores."""
    with contextlib.ExitStack() as engines:

        def begin(name: str, port: int, **failover: Any) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port), *SEVERAL, failover=failover))

        yield begin


def everywhere(client: Client, method: str, where: str, body: Any = None) -> list[Any]:
    """What an engine answers over so many connections that each of its workers should be asked."""
    return [client.request(method, where, {} if method == "POST" and body is None else body) for _ in range(ENOUGH)]


def until_both_answer(client: Client) -> None:
    """Ask a primary until each of its two workers has answered: the first one alone knows the epochs of its memory."""

    def both() -> bool:
        return len({bool(answer.get("epochs")) for _, answer in everywhere(client, "GET", "/gms/status")}) == 2

    until(both, "one of its workers does not answer")


def test_shadow_takes_over_as_a_whole_when_one_tokenizer_worker_is_killed(story: SglangStory, start: Callable[..., Running]) -> None:
    client = Client(story.model, free_port())
    first = start("first", client.port, huge_pages=False)
    story.until_role(first, "primary")
    right = client.tokens()
    second = start("second", client.port)
    story.until_role(second, "standby")
    assert story.processes(first) == story.processes(second) == WHOLE
    assert {answer["engine"] for _, answer in everywhere(client, "GET", "/gms/status")} == {first.name}
    killed = story.kill(first, "api-server 1")
    first.until_gone()  # before that its other worker may still answer
    client.first_token_after(killed)
    assert first.process.returncode != 0
    assert [client.tokens() for _ in range(ENOUGH)] == [right] * ENOUGH
    assert {(answer["engine"], answer["role"]) for _, answer in everywhere(client, "GET", "/gms/status")} == {(second.name, "primary")}
    until_both_answer(client)
    os.kill(second.process.pid, signal.SIGTERM)
    second.until_gone()
    assert second.process.returncode == 0
    assert story.status().cohorts == ()


@pytest.mark.long
@pytest.mark.parametrize("process", ["main", "api-server 0", "rank 0"])
def test_shadow_takes_over_when_another_process_is_killed(story: SglangStory, start: Callable[..., Running], process: str) -> None:
    client = Client(story.model, free_port())
    first = start("first", client.port, huge_pages=False)
    story.until_role(first, "primary")
    right = client.tokens()
    second = start("second", client.port, huge_pages=False)
    story.until_role(second, "standby")
    killed = story.kill(first, process)
    first.until_gone()
    client.first_token_after(killed)
    assert [client.tokens() for _ in range(ENOUGH)] == [right] * ENOUGH


@pytest.mark.long
@pytest.mark.parametrize("process", ["main", "api-server 1"])
def test_shadow_takes_over_when_a_process_hangs(story: SglangStory, start: Callable[..., Running], process: str) -> None:
    client = Client(story.model, free_port())
    first = start("first", client.port, huge_pages=False, deadline_s=10.0)
    story.until_role(first, "primary")
    right = client.tokens()
    second = start("second", client.port, huge_pages=False, deadline_s=10.0)
    story.until_role(second, "standby")
    os.kill(story.pid_of(first, process), signal.SIGSTOP)
    hung = time.monotonic()
    first.until_gone()
    client.first_token_after(hung)
    assert [client.tokens() for _ in range(ENOUGH)] == [right] * ENOUGH


@pytest.mark.long
def test_every_worker_refuses_and_then_serves_and_sleeps_when_the_gate_is_503(story: SglangStory, start: Callable[..., Running]) -> None:
    one, two = (Client(story.model, free_port()) for _ in range(2))
    first = start("first", one.port, gate="503", drain_timeout_s=60.0)
    story.until_role(first, "primary")
    right = one.tokens()
    second = start("second", two.port, gate="503", drain_timeout_s=60.0)
    story.until_role(second, "standby")
    assert {status for status, _ in everywhere(two, "POST", "/generate")} == {503}
    assert {answer["role"] for _, answer in everywhere(two, "GET", "/gms/status")} == {"standby"}
    running = [Streamed(one) for _ in range(ENOUGH)]
    story.order(first, "demote")
    assert all(streamed.tokens()[: len(right)] == right for streamed in running)
    first.until_gone()
    assert first.process.returncode == 0
    story.until_role(second, "primary")
    assert [two.tokens() for _ in range(ENOUGH)] == [right] * ENOUGH
    assert {status for status, _ in everywhere(two, "POST", "/resume_memory_occupation")} == {400}
    until_both_answer(two)
    assert two.request("POST", "/release_memory_occupation", {})[0] == 200
    assert {status for status, _ in everywhere(two, "POST", "/generate", {"text": "any"})} == {503}
    assert two.request("POST", "/resume_memory_occupation", {})[0] == 200
    assert two.tokens() == right
