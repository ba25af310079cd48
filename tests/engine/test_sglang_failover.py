"""Shadows of real SGLang engines: held until the primary is gone, then serving at its address, or at their own; and how engines end in order.

What else of a primary can be killed, and when, is in `test_sglang_kills.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chaos.squatter import squatting
from failover_story import Client, Running, until
from packaging.version import Version
from sglang_site import Site, version
from sglang_story import SglangStory, Streamed

from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

WHOLE = ["api-server 0", "detokenizer", "rank 0"]
MAIN_AND_CHILDREN = 3
"""A scheduler and a detokenizer."""
FEW = 3
"""Tokens of an answer where ranks wait for one another at each layer."""
LAUNCHER = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.server_args import prepare_server_args
launch_server(prepare_server_args(sys.argv[1:]))
"""


@pytest.fixture
def story(server: Any, failover_model: Path, tmp_path: Path) -> SglangStory:
    """Engines of that model on one server."""
    return SglangStory(server, failover_model, tmp_path)


def test_shadow_tells_the_truth_and_obeys_when_the_gate_is_503(story: SglangStory) -> None:
    pages, ports = [free_port(), free_port()], [free_port(), free_port()]

    def options(number: int) -> dict[str, Any]:
        return {"gate": "503", "autonomous": number == 0, "status_address": f"127.0.0.1:{pages[number]}", "drain_timeout_s": 60.0}

    first, second = (Client(story.model, port) for port in ports)
    with contextlib.ExitStack() as engines:

        def start(name: str, port: int, failover: Any) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port), failover=failover))

        one = start("one", ports[0], options(0))
        story.until_role(one, "primary")
        right = first.tokens()
        two = start("two", ports[1], options(1))
        story.until_role(two, "standby")
        status, refusal = second.request("POST", "/generate", {"text": "any"})
        assert (status, refusal["error"]["type"]) == (503, "standby")
        assert second.request("GET", "/health")[0] == second.request("GET", "/health_generate")[0] == 503
        assert second.request("GET", "/gms/status")[1]["role"] == "standby"
        page = Client(story.model, pages[1])
        assert page.request("GET", "/gms/status")[1]["role"] == "standby"
        assert page.request("GET", "/health")[0] == 503
        story.order(one, "demote")
        one.until_gone()
        assert story.ended_in_order(one)
        assert story.seen(two).role == "standby"  # type: ignore[union-attr]
        story.order(two, "promote")
        story.until_role(two, "primary")
        assert second.tokens() == right
        assert second.request("GET", "/health")[0] == page.request("GET", "/health")[0] == 200


class Launched(SglangStory):
    """Engines that a program of the user's own launches."""

    @property
    def command(self) -> Sequence[str]:
        python, _, _, *options = super().command
        return (python, "-c", LAUNCHER, *options)


def test_engine_is_held_when_a_program_enters_sglang_behind_its_command_line(server: Any, failover_model: Path, tmp_path: Path) -> None:
    story, client = Launched(server, failover_model, tmp_path), Client(failover_model, free_port())
    with story.engine("launched", "--port", str(client.port), failover={"autonomous": False}) as engine:
        story.until_role(engine, "standby")
        assert not client.listens()
        story.order(engine, "promote")
        story.until_role(engine, "primary")
        assert len(client.tokens(FEW)) == FEW
        os.kill(engine.process.pid, signal.SIGTERM)
        engine.until_gone()
        assert story.ended_in_order(engine)


@pytest.mark.long
def test_all_ranks_take_over_and_sleep_when_one_of_several_is_killed(story: SglangStory) -> None:
    client = Client(story.model, free_port())
    cpus = sorted(os.sched_getaffinity(0))[:2]
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus))}
    with contextlib.ExitStack() as engines:

        def start(name: str) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(client.port), "--tp-size", "2", environment=variables))

        first = start("first")
        story.until_role(first, "primary")
        right = client.tokens(FEW)
        second = start("second")
        story.until_role(second, "standby")
        assert story.processes(second) == [*WHOLE, "rank 1"]
        assert client.request("GET", "/gms/status")[1]["engine"] == first.name
        killed = story.kill(first, "rank 1")
        first.until_gone()
        client.first_token_after(killed)
        assert client.tokens(FEW) == right
        told = client.request("GET", "/gms/status")[1]
        assert (told["engine"], told["role"], told["epochs"].keys()) == (second.name, "primary", {"rank 0", "rank 1"})
        assert client.request("POST", "/release_memory_occupation", {})[0] == 200
        assert client.request("POST", "/resume_memory_occupation", {})[0] == 200
        assert client.tokens(FEW) == right
        os.kill(second.process.pid, signal.SIGTERM)
        second.until_gone()
        assert story.ended_in_order(second)
        assert story.status().cohorts == ()


@pytest.mark.long
def test_engine_ends_in_order_or_tells_why_when_it_does_not_serve_any_more(story: SglangStory) -> None:
    port = free_port()
    client = Client(story.model, port)
    with contextlib.ExitStack() as engines:

        def start(name: str, **failover: Any) -> Running:
            return engines.enter_context(story.engine(name, "--port", str(port), failover=failover))

        serving = start("serves")
        story.until_role(serving, "primary")
        right = client.tokens()
        failing, last = start("fails", promotion_timeout_s=2.0), start("last", promotion_timeout_s=120.0)
        story.until_role(failing, "standby")
        story.until_role(last, "standby")
        story.order(failing, "promote")
        until(lambda: story.is_next(failing), "the engine that is to fail is not the next one")
        story.order(failing, "")  # it would go before the squatter as well
        (pool,) = story.status().retained
        running = Streamed(client)
        with squatting(story.server.socket, "squatter", pool) as squatter:
            os.kill(serving.process.pid, signal.SIGTERM)
            assert running.tokens()[: len(right)] == right
            serving.until_gone()
            assert story.ended_in_order(serving)
            squatter.until_it("holds")
            failing.until_gone()
            assert failing.process.returncode == 1
            assert "PromotionFailed: fails was elected" in failing.tail()
            story.until_role(last, "promoting")
            assert not client.listens()
        story.until_role(last, "primary")
        assert client.tokens() == right

        lonely = start("lonely")
        story.until_role(lonely, "standby")
        story.server.lose_everything()
        lonely.until_gone()
        assert lonely.process.returncode == 1
        assert client.tokens() == right
        until(lambda: story.processes(last) == WHOLE, "the primary's processes have not joined the new server")


REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["--smg-grpc-mode"], {}, "a gRPC front end"),
    (["--use-ray"], {}, "Ray"),
    (["--enable-http2"], {}, "HTTP/2"),
    (["--tokenizer-worker-num", "2", "--enable-ssl-refresh"], {}, "certificates are not refreshed"),
    (["--grpc-port", "1234"], {}, "the gRPC server beside the HTTP server"),
    (["--disaggregation-mode", "decode"], {}, "bootstrap"),
    (["--warmups", "mine"], {}, "warm-ups of one's own"),
    (["--checkpoint-engine-wait-weights-before-ready"], {}, "waits for weights"),
    *((["--nnodes", "2", "--node-rank", rank, "--tp-size", "2", "--dist-init-addr", "127.0.0.1:1234"], {}, "several nodes") for rank in "01"),
    (["--tp-size", "2", "--dp-size", "2"], {}, "data parallelism"),
    ([], {"GMS_FAILOVER": '{"lock": "etcd:somewhere"}'}, "lock"),
    ([], {"GMS_FAILOVER": "not JSON"}, "GMS_FAILOVER is no JSON"),
]
RUST: tuple[list[str], dict[str, str], str] = ([], {"SGLANG_RUST_SERVER": "1"}, "the front end in Rust")
"""0.5.16 has none."""


def test_options_are_refused_when_such_engines_do_not_fail_over(story: SglangStory) -> None:
    site = Site(story.server.directory, story.folder)
    refused = [*REFUSED, RUST] if version() > Version("0.5.16") else REFUSED
    cases = [(options, {"GMS_FAILOVER": "{}", **environment}) for options, environment, _ in refused]
    answers = site.ask(Path(__file__).with_name("sglang_refusals.py"), str(story.model), json.dumps(cases))
    for answer, (options, environment, words) in zip(answers, refused, strict=True):
        assert answer is not None, (options, environment)
        assert answer[0] in ("engine_unsupported", "configuration"), answer
        assert words in answer[1], answer


def test_nothing_is_left_when_an_engine_is_killed_while_it_starts(story: SglangStory) -> None:
    with story.engine("early") as engine:
        until(lambda: len(engine.pids()) >= MAIN_AND_CHILDREN, "it has not started its scheduler")
        engine.process.kill()
        engine.until_gone()
