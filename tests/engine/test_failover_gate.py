"""Shadows of real vLLM engines: held until the primary is gone, then serving at the same address, whatever of the primary was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from failover_story import Client, Running, Story, until

from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

WHOLE = ["api-server 0", "engine-core", "rank 0"]
SHARED_MEMORY = Path("/dev/shm")
SEVERAL = ["api-server 0", "api-server 1", "engine-core", "main", "rank 0"]


@pytest.fixture
def right(stock_answers: list[list[str]]) -> list[str]:
    """What a stock engine answers."""
    return stock_answers[0]


def take_over(story: Story, client: Client, dying: Running, process: str, shadow: Running, right: list[str]) -> None:
    """Kill a process of the primary: the shadow serves, and of the primary nothing is left."""
    assert story.primaries() == [dying.name]
    names = dying.named_memory()
    killed = story.kill(dying, process)
    dying.until_gone()  # before that another of its API servers may still answer
    client.first_token_after(killed)
    until(lambda: not any((SHARED_MEMORY / name).exists() for name in names), f"{names} of {dying.name} are left")
    story.until_role(shadow, "primary")
    assert story.primaries() == [shadow.name]
    assert client.tokens() == right
    assert client.request("GET", "/gms/status")[1]["engine"] == shadow.name


def test_shadow_serves_on_the_same_port_when_the_primary_or_a_part_of_it_is_killed(story: Story, right: list[str]) -> None:
    port = free_port()
    client = Client(story.model, port)
    with contextlib.ExitStack() as engines:

        def start(name: str) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port)))

        serving = start("engine-0")
        story.until_role(serving, "primary")
        assert client.tokens() == right
        assert story.processes(serving) == WHOLE
        for number, process in enumerate(("group", "api-server 0", "engine-core"), 1):
            shadow = start(f"engine-{number}")
            standby = story.until_role(shadow, "standby")
            assert len(standby.members) == len(WHOLE)
            assert client.request("GET", "/gms/status")[1]["engine"] == serving.name
            take_over(story, client, serving, process, shadow, right)
            serving = shadow
        told = client.request("GET", "/gms/status")[1]
        assert (told["role"], told["term"], set(told["epochs"].values())) == ("primary", 4, {4})
        settled = [line for line in serving.log.read_text().splitlines() if "host memory are in huge pages" in line]
        assert {line.rpartition("] ")[2].partition(":")[0] for line in settled} == {"api-server 0", "engine core", "rank 0"}
        assert serving.timeline()["event"] == "promoted"
        os.kill(serving.process.pid, signal.SIGTERM)
        serving.until_gone()
        assert serving.process.returncode == 0
        assert story.status().cohorts == ()


def test_shadow_tells_the_truth_and_obeys_when_the_gate_is_503(story: Story, right: list[str]) -> None:
    pages = [free_port(), free_port()]
    ports = [free_port(), free_port()]

    def options(number: int) -> dict[str, Any]:
        return {"gate": "503", "autonomous": number == 0, "status_address": f"127.0.0.1:{pages[number]}", "drain_timeout_s": 60.0}

    first, second = (Client(story.model, port) for port in ports)
    with story.engine("one", "--port", str(ports[0]), failover=options(0)) as one:
        story.until_role(one, "primary")
        assert first.tokens() == right
        with story.engine("two", "--port", str(ports[1]), failover=options(1)) as two:
            story.until_role(two, "standby")
            status, refusal = second.request("POST", "/v1/completions", {"model": "any", "prompt": "any"})
            assert (status, refusal["error"]["type"]) == (503, "standby")
            assert second.request("GET", "/health")[0] == 503
            assert second.request("GET", "/metrics")[0] == 200
            assert second.request("GET", "/gms/status")[1]["role"] == "standby"
            page = Client(story.model, pages[1])
            assert page.request("GET", "/gms/status")[1]["role"] == "standby"
            assert page.request("GET", "/health")[0] == 503
            story.order(one, "demote")
            one.until_gone()
            assert one.process.returncode == 0
            assert story.seen(two).role == "standby"  # type: ignore[union-attr]
            story.order(two, "promote")
            story.until_role(two, "primary")
            assert second.tokens() == right
            assert second.request("GET", "/health")[0] == page.request("GET", "/health")[0] == 200


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "api.sock"


def test_several_api_servers_take_over_a_unix_socket_when_their_main_process_is_killed(story: Story, right: list[str], path: Path) -> None:
    options = ("--uds", str(path), "--api-server-count", "2")
    client = Client(story.model, path=path)
    with story.engine("one", *options) as one:
        story.until_role(one, "primary")
        assert story.processes(one) == SEVERAL
        assert client.tokens() == right
        with story.engine("two", *options) as two:
            story.until_role(two, "standby")
            take_over(story, client, one, "main", two, right)
            assert [entry.name for entry in path.parent.iterdir() if "api.sock" in entry.name] == [path.name]
            with story.engine("three", *options) as three:
                story.until_role(three, "standby")
                take_over(story, client, two, "api-server 1", three, right)
                story.order(three, "demote")
                three.until_gone()
                assert three.process.returncode == 0
                with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
                    late.connect(str(path))
