"""Tokenizer workers of an engine that fails over, as real processes: they share a socket, and one's end is everybody's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from gms_core.errors import EngineUnsupported
from gms_sglang.refused_failover import check_failover
from gms_sglang.tokenizer_workers import workers_held
from tests.unit.failover_processes import Told, told_processes
from tests.unit.stand_in_workers import FAILS
from tests.unit.test_sglang_options import stand_in

PROGRAM = "from tests.unit.stand_in_workers import main; main()"


@pytest.fixture
def engine() -> Iterator[Told]:
    """The main process of two workers."""
    with told_processes() as start:
        yield start(PROGRAM)


def pids(engine: Told) -> list[int]:
    """Those of its workers, once they have come to their end of the story."""
    engine.until(done=0)
    while sum("done" in facts for facts in engine.heard) < 2:
        engine.until_key("done")
    return [facts["pid"] for facts in sorted((facts for facts in engine.heard if "worker" in facts), key=lambda facts: facts["worker"])]


def said(engine: Told, key: str) -> list[Any]:
    return [facts[key] for facts in engine.heard if key in facts]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_first_worker_asks_for_all_when_there_are_several(engine: Told) -> None:
    pids(engine)
    assert said(engine, "sockets") == said(engine, "told") == [["/one", "/two"]]
    assert said(engine, "servers") == [2, 2]
    assert len(set(said(engine, "port"))) == 1
    assert said(engine, "asked") == ["place", "stand_by", "beat", "unfinished"]
    assert sorted(said(engine, "beats")) == [0, 2]
    assert said(engine, "answering") == [1 + 7]  # the first one has not said anything yet
    assert said(engine, "unfinished") == [5 + 2 + 7]
    order = [next(iter(facts)) for facts in engine.heard]
    assert order.index("answering") < order.index("all_ready") < order.index("unfinished")


@pytest.mark.parametrize("who", ["main", 1])
def test_all_workers_end_in_order_when_one_process_is_told_to(engine: Told, who: Any) -> None:
    workers = pids(engine)
    os.kill(engine.pid if who == "main" else workers[who], signal.SIGTERM)
    assert engine.until_key("over")
    assert sorted(said(engine, "ended")) == [0, 1]
    assert said(engine, "closed") == [True]
    assert engine.wait() == 0


@pytest.mark.parametrize(
    ("who", "number", "words"), [(1, signal.SIGKILL, "was killed by SIGKILL"), (0, signal.SIGUSR1, f"has ended with exit code {FAILS}")]
)
def test_engine_fails_and_nobody_is_left_when_a_worker_ends_by_itself(engine: Told, who: int, number: int, words: str) -> None:
    workers = pids(engine)
    os.kill(workers[who], number)
    assert engine.until_key("error") == "engine_failed"
    assert f"tokenizer worker {who} {words}" in engine.heard[-1]["message"]
    assert engine.wait() == 1
    assert not any(map(is_alive, workers))
    assert engine.rest() == []  # nor is a process that they have forked: the pipe has ended, which each of them had


def test_no_worker_is_left_when_the_main_process_is_killed(engine: Told) -> None:
    pids(engine)
    engine.kill()
    assert engine.rest() == []  # the pipe has ended, which each of them had, and what they have forked


@pytest.fixture
def nothing_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What uvicorn was asked to run."""
    asked: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: asked.append(app))
    return asked


def test_another_app_is_uvicorns_when_workers_are_held_and_without_them_the_engine_fails(nothing_run: list[Any]) -> None:
    engine: Any = SimpleNamespace()
    before = uvicorn.run
    with pytest.raises(EngineUnsupported, match="has not started tokenizer workers"), workers_held(engine, engine, None, None):
        uvicorn.run("another:app", workers=2)
    assert nothing_run == ["another:app"]
    assert uvicorn.run is before


@pytest.mark.parametrize(
    ("options", "is_set", "words"),
    [
        ({"enable_http_worker_reuseport": True}, False, "a socket each"),
        ({"enable_ssl_refresh": True}, False, "certificates are not refreshed"),
        ({}, True, "an app of one's own"),
        ({"enable_http2": True}, False, "HTTP/2"),
    ],
)
def test_ways_to_serve_are_refused_when_several_workers_cannot_be_held_so(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], is_set: bool, words: str
) -> None:
    path = SimpleNamespace(is_set=lambda: is_set)
    stand_in(monkeypatch, "sglang.srt.environ", envs=SimpleNamespace(SGLANG_HTTP_SERVER_APP_PATH=path))
    with pytest.raises(EngineUnsupported, match=words):
        check_failover({"tokenizer_worker_num": 2, **options}.get)


@pytest.mark.parametrize("several", [{}, {"tokenizer_worker_num": 2}])
def test_engine_may_fail_over_when_it_has_any_number_of_workers(monkeypatch: pytest.MonkeyPatch, several: dict[str, Any]) -> None:
    stand_in(monkeypatch, "sglang.srt.environ", envs=SimpleNamespace())
    option: Callable[[str], Any] = several.get
    check_failover(option)
