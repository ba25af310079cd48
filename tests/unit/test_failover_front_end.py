"""An API server's way to its service and to its end, with an engine whose main thread blocks meanwhile, against a real server."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_core.protocol.messages import Instruct
from tests.conftest import RunningServer
from tests.unit.failover_processes import Told, told_processes

PROGRAM = (Path(__file__).parent / "blocking_engine.py").read_text()
BEFORE = ["join", "prepared", "rehearse", "settle"]
Start = Callable[..., Told]


@pytest.fixture
def start(server: RunningServer) -> Iterator[Start]:
    """Starts an engine with these options; without other words all of its processes have one server."""
    with told_processes() as begin:
        yield lambda **options: begin(PROGRAM, json.dumps({"socket": str(server.socket), **options}))


def asked(told: list[dict[str, Any]]) -> list[str]:
    """What the ranks and the HTTP server were asked, in this order."""
    return [facts.get("asked", facts.get("http")) for facts in told if {"asked", "http"} & facts.keys()]


def order(server: RunningServer, wanted: Any) -> None:
    with server.connect() as session:
        (cohort,) = session.status().cohorts
        session.perform(Instruct(cohort.name, wanted))


def test_address_opens_last_when_engines_share_it(start: Start) -> None:
    engine = start()
    assert engine.until_key("serves") == 1
    assert asked(engine.heard) == [*BEFORE, "stand by", "promote, bridge False", "check alone", "open"]
    kv = engine.heard[-1]["kv"]
    assert (kv["bytes"], kv["hold_s"], kv["map_s"]) == (4096, 0.25, 0.5)


def test_address_opens_before_the_engine_stands_by_when_each_has_its_own(start: Start) -> None:
    engine = start(failover={"gate": "503"})
    engine.until_key("serves")
    assert asked(engine.heard) == [*BEFORE, "open", "stand by", "promote, bridge False"]


def test_nothing_is_rehearsed_or_moved_when_that_is_not_wanted(start: Start) -> None:
    engine = start(failover={"rehearse": False, "huge_pages": False})
    engine.until_key("serves")
    assert asked(engine.heard)[:3] == ["join", "prepared", "stand by"]


def test_engine_serves_from_its_bridge_and_has_all_later_when_every_rank_has_one(start: Start) -> None:
    engine = start(blocks=3, gives=[["asleep", ""], ["whole", ""]])
    engine.until(asked="withhold 3")
    engine.until(asked="promote, bridge True")
    engine.until_key("serves")
    while asked(engine.heard).count("give all") < 3:  # it waits, it is asleep, it has all
        engine.until(asked="give all")
    engine.signal(signal.SIGTERM)
    assert engine.wait() == 0
    assert engine.rest() == [{"failure": ""}]


def test_engine_ends_when_it_can_never_have_all_of_its_memory(start: Start) -> None:
    engine = start(blocks=3, gives=[["failed", "a process cannot be ended"]])
    engine.until(http="end")
    failure = engine.until_key("failure")
    assert "can never have the rest: a process cannot be ended" in failure
    assert engine.wait() == 0


def test_thread_that_waits_is_told_why_when_a_rank_cannot_stand_by(start: Start) -> None:
    engine = start(refusal="its memory went with a server")
    engine.until(http="end")
    said = engine.until(error="EngineFailed")
    assert "this engine cannot stand by for another: rank 0: its memory went with a server" in said["message"]
    assert engine.wait() == 0
    assert "stand by" in asked(engine.heard)
    assert not {"open", "promote, bridge False"} & set(asked(engine.heard))


def test_thread_that_waits_is_told_why_when_a_server_is_not_there(start: Start, tmp_path: Path) -> None:
    engine = start(socket=str(tmp_path / "none.sock"))
    assert engine.until_key("error") == "ServerUnavailable"
    assert engine.wait() == 0


def test_engine_ends_when_its_http_server_is_never_prepared(start: Start) -> None:
    engine = start(fails="prepared")
    engine.until(http="end")
    assert "cannot serve at 127.0.0.1:0: the app does not start" in engine.until(error="PromotionFailed")["message"]
    assert engine.wait() == 0


@pytest.mark.parametrize("held", ["rehearse", "settle", "stand by"])
def test_thread_that_waits_goes_on_when_the_engine_is_told_to_end_before_it_stands_by(server: RunningServer, start: Start, held: str) -> None:
    engine = start(holds=held)
    engine.until(holds=held)
    engine.signal(signal.SIGTERM)
    assert "stopped" in engine.until(error="NotPromoted")["message"]
    assert engine.wait() == 0
    assert not {"open", "end"} & set(asked(engine.heard))


def test_address_stays_closed_when_the_engine_is_demoted_before_it_is_open(server: RunningServer, start: Start) -> None:
    engine = start(holds="open")
    engine.until(holds="open")
    order(server, "demote")
    engine.until(http="shut")
    engine.until(asked="unfinished")
    engine.tell("let go")
    engine.until(http="open")
    engine.until(http="shut")
    assert "demoted by an operator" in engine.until(error="NotPromoted")["message"]
    assert engine.wait() == 0
    assert start().until_key("serves") == 2


def test_engine_is_ended_when_only_its_http_server_hangs(start: Start) -> None:
    first = start(failover={"deadline_s": 3.0})
    first.until_key("serves")
    second = start()
    second.until(asked="stand by")
    first.tell("hang")
    assert second.until_key("serves") == 2


def test_engine_is_ended_when_a_device_does_not_finish(start: Start) -> None:
    first = start(stalls=True, failover={"deadline_s": 3.0})
    first.until_key("serves")
    second = start()
    assert second.until_key("serves") == 2


def test_further_api_server_follows_when_the_first_one_serves_and_is_demoted(server: RunningServer, start: Start) -> None:
    sibling = start(cohort="c0ffee", place=[1, 1])
    sibling.until(http="prepared")
    first = start(cohort="c0ffee")
    assert first.until_key("serves") == sibling.until_key("serves") == 1
    assert asked(sibling.heard) == ["prepared", "open"]
    order(server, "demote")
    assert first.wait() == 0
    sibling.until(http="shut")
    sibling.until(asked="unfinished")
    sibling.signal(signal.SIGTERM)
    assert sibling.wait() == 0


def test_requests_are_finished_and_the_next_serves_when_an_engine_is_demoted(server: RunningServer, start: Start) -> None:
    first = start(running=3)
    assert first.until_key("serves") == 1
    order(server, "demote")
    assert first.wait() == 0
    said = first.rest()
    assert asked(said) == ["shut", "unfinished", "unfinished", "unfinished"]
    assert {"failure": ""} in said
    assert start().until_key("serves") == 2


def test_next_serves_when_an_engine_is_killed(start: Start) -> None:
    first = start()
    first.until_key("serves")
    second = start()
    second.until(asked="stand by")
    first.kill()
    assert second.until_key("serves") == 2
