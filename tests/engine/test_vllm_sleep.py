"""Real vLLM engines on CPU sleep and wake up by GMS: nothing is copied, addresses stay, and other engines serve meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from failover_story import Client, Running, Story, until
from models import write_model
from site_of_engines import Site

from gms_core.errors import InvalidArgument
from tests.conftest import RunningServer
from tests.ports import free_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn about things that are not ours
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    from gms_vllm.sleep import GmsSleepBackend, register_backend

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


SLEEP = {"enable_sleep_mode": True}
LOOK_S = 1.0
"""Seconds in which an engine notices a request, or that its client is gone."""
KV_BYTES = 16 * 2**20


def test_tokens_are_equal_when_engines_sleep_by_turns(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.engine(model, arguments=SLEEP) as writer:
        published = writer.answer()
        expected, weights = published["tokens"], published["figures"]["bytes"]
        assert published["mapped"] == published["held"] == weights + KV_BYTES
        with site.engine(model, arguments=SLEEP) as reader:
            assert reader.answer()["tokens"] == expected

            assert writer.ask("sleep 1") == {"mapped": 0, "held": weights}
            assert writer.ask("step")["error"] == "engine_asleep"
            assert reader.again()["tokens"] == expected
            assert writer.ask("wake") == {"mapped": weights + KV_BYTES, "held": weights + KV_BYTES}
            assert writer.again()["tokens"] == expected

            assert reader.ask("sleep 2") == {"mapped": 0, "held": weights}
            assert writer.again()["tokens"] == expected
            assert reader.ask("wake weights") == {"mapped": weights, "held": weights}
            assert reader.ask("step")["error"] == "engine_asleep"
            assert reader.ask("wake kv_cache") == {"mapped": weights + KV_BYTES, "held": weights + KV_BYTES}
            assert reader.ask("step")["error"] is None
            assert reader.again()["tokens"] == expected


def mapped(engine: Running) -> int:
    """Bytes of memory files that an engine's processes have mapped."""
    total = 0
    for pid in engine.pids():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            ends = [line.split(" ", 1)[0].split("-") for line in lines if "memfd:gms-" in line]
            total += sum(int(end, 16) - int(start, 16) for start, end in ends)
    return total


def test_request_is_answered_after_the_wake_up_when_it_came_while_the_engine_slept(server: RunningServer, tmp_path: Path) -> None:
    model, port = write_model(tmp_path / "model", "llama"), free_port()
    client, options = Client(model, port), ("--load-format", "gms", "--enable-sleep-mode", "--port", str(port))
    development = {"VLLM_SERVER_DEV_MODE": "1"}
    with (
        Story(server, model, tmp_path).engine("sleeper", *options, load_format="auto", environment=development) as engine,
        ThreadPoolExecutor() as pool,
    ):
        until(client.listens, "the engine does not listen")
        expected, awake = client.tokens(), mapped(engine)
        assert awake > KV_BYTES
        for level in (1, 2):
            assert client.request("POST", f"/sleep?level={level}")[0] == 200
            assert client.request("GET", "/is_sleeping")[1] == {"is_sleeping": True}
            assert mapped(engine) == 0
            give_up(client)
            answer = pool.submit(client.tokens)
            assert client.request("GET", "/health")[0] == 200
            assert client.request("POST", "/wake_up?tags=weights")[0] == 200
            assert 0 < mapped(engine) < awake
            assert not answer.done()
            assert client.request("POST", "/wake_up?tags=kv_cache")[0] == 200
            assert answer.result() == expected
            assert mapped(engine) == awake
            assert client.request("GET", "/is_sleeping")[1] == {"is_sleeping": False}


def give_up(client: Client) -> None:
    """Ask, and go away before there is an answer: the engine then makes a step to forget the request."""
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        body = json.dumps({"model": str(client.model), "prompt": "hello", "max_tokens": 4}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        time.sleep(LOOK_S)  # nothing tells of a request that waits in an engine that makes no steps
    time.sleep(LOOK_S)


def test_backend_says_what_state_it_is_in_when_it_unmaps_and_maps() -> None:
    backend = GmsSleepBackend()
    with pytest.raises(InvalidArgument, match="level"):
        backend.suspend(3)
    assert (backend.sleeper.asleep, backend.state()) == (frozenset(), "RUNNING")
    backend.discard(("kv_cache",))
    assert (backend.sleeper.asleep, backend.state()) == ({"kv_cache"}, "SUSPENDED")
    backend.suspend(2)
    assert (backend.sleeper.asleep, backend.state()) == ({"kv_cache", "weights"}, "SUSPENDED")
    backend.resume(["weights"])
    assert (backend.sleeper.asleep, backend.state()) == ({"kv_cache"}, "SUSPENDED")
    backend.resume()
    assert (backend.sleeper.asleep, backend.state()) == (frozenset(), "RUNNING")


def test_backend_is_registered_once_when_several_workers_ask() -> None:
    register_backend()
    register_backend()
    assert SleepModeBackendFactory.get_backend_class("gms") is GmsSleepBackend
