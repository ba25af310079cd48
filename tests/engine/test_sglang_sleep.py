"""Real SGLang servers on CPU sleep and wake up by GMS: nothing is copied, addresses stay, and other engines serve meanwhile."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from models import write_model
from sglang_site import PROMPTS, Server, Site, ready

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

KV_BYTES = 4096 * 2 * 2 * 32 * 2 * 4
"""Tokens, layers, heads, elements of a head, keys and values, bytes of an element."""


@pytest.fixture
def site(server: Any, tmp_path: Path) -> Site:
    return Site(server.directory, tmp_path)


def change(engine: Server, what: str, *tags: str) -> tuple[int, str]:
    """Ask an engine to release or to resume memory; returns the status and what it says."""
    body = json.dumps({"tags": list(tags)} if tags else {}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{engine.port}/{what}_memory_occupation", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def refused(answer: tuple[int, str], words: str) -> bool:
    return answer[0] == 400 and words in answer[1]


def test_tokens_are_equal_when_engines_sleep_by_turns(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.serve(model) as writer, site.serve(model) as reader:
        expected, attached = ready(writer, reader)
        assert attached == expected
        weights = int(writer.figures()["bytes"])
        for engine in (writer, reader):
            awake, kept = engine.memory()
            assert awake > weights + KV_BYTES
            assert change(engine, "release")[0] == 200
            assert engine.memory() == (0, weights)
            assert kept - weights > KV_BYTES
            status, answer = engine.post("/generate", {"input_ids": [5, 17], "sampling_params": {"max_new_tokens": 1}})
            assert (status, "asleep" in json.dumps(answer)) == (503, True)
            other = reader if engine is writer else writer
            assert other.tokens() == expected
            assert change(engine, "resume", "weights")[0] == 200
            assert engine.memory() == (weights, weights)
            assert change(engine, "resume", "kv_cache")[0] == 200
            assert change(engine, "resume")[0] == 200  # the rest: SGLang's third kind of memory
            assert engine.memory() == (awake, kept)
            assert engine.tokens() == expected


def test_engine_serves_on_when_what_is_asked_of_its_memory_cannot_be(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.serve(model) as engine, ThreadPoolExecutor() as pool:
        (expected,) = ready(engine)
        assert refused(change(engine, "resume"), "no memory of this engine is released")
        assert refused(change(engine, "release", "brain"), "there is no memory of the kind 'brain'")
        assert refused(change(engine, "resume", "brain"), "there is no memory of the kind 'brain'")
        assert change(engine, "release", "kv_cache")[0] == 200
        assert change(engine, "release", "kv_cache")[0] == 200
        assert refused(change(engine, "resume", "weights"), "no memory of the kind weights is released")
        assert change(engine, "resume")[0] == 200
        assert engine.tokens() == expected
        begun = threading.Event()
        answer = pool.submit(long_answer, engine, begun)
        assert begun.wait(60)
        assert engine.post("/pause_generation", {"mode": "in_place"})[0] == 200
        assert refused(change(engine, "release"), "the engine has requests")
        assert engine.post("/continue_generation", {})[0] == 200
        assert answer.result(60)[: len(expected[0])] == expected[0]
        assert engine.tokens() == expected


def long_answer(engine: Server, begun: threading.Event) -> list[int]:
    """All tokens of an answer that takes some time, of which the first ones have come when the event is set."""
    sampling = {"temperature": 0.0, "max_new_tokens": 110, "ignore_eos": True}
    body = json.dumps({"input_ids": PROMPTS[0], "sampling_params": sampling, "stream": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{engine.port}/generate", body, {"Content-Type": "application/json"})
    tokens: list[int] = []
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                tokens = json.loads(line.removeprefix(b"data: "))["output_ids"]
                begun.set()
    return tokens
