"""Schedulers of SGLang that rest while their engine stands by, on real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from gms_sglang import rest


@pytest.fixture
def channels() -> Iterator[tuple[SimpleNamespace, Any]]:
    """The sockets of a scheduler, and the other end of the one by which calls arrive."""
    with zmq.Context() as context:
        requests, calls, caller = context.socket(zmq.PULL), context.socket(zmq.PULL), context.socket(zmq.PUSH)
        with requests, calls, caller:
            requests.bind("inproc://requests")
            calls.bind("inproc://calls")
            caller.connect("inproc://calls")
            yield SimpleNamespace(recv_from_tokenizer=requests, recv_from_rpc=calls), caller


def test_rest_ends_when_something_arrives(channels: tuple[SimpleNamespace, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "_NAP_MS", 60_000)
    sockets, caller = channels
    scheduler = SimpleNamespace(idle_sleeper=None, ipc_channels=sockets)
    rest.begin(scheduler)
    resting = threading.Thread(target=scheduler.idle_sleeper.maybe_sleep, daemon=True)
    resting.start()
    caller.send(b"promote")
    resting.join(30)
    assert not resting.is_alive()
    assert sockets.recv_from_rpc.recv(zmq.NOBLOCK) == b"promote"


def test_scheduler_is_as_before_when_the_rest_has_ended(channels: tuple[SimpleNamespace, Any]) -> None:
    scheduler = SimpleNamespace(idle_sleeper=None, ipc_channels=channels[0])
    rest.begin(scheduler)
    rest.begin(scheduler)
    assert scheduler.idle_sleeper is not None
    rest.end(scheduler)
    rest.end(scheduler)
    assert scheduler.idle_sleeper is None


def test_sleeper_of_sglang_stays_when_its_option_asks_for_one(channels: tuple[SimpleNamespace, Any]) -> None:
    scheduler = SimpleNamespace(idle_sleeper="its own", ipc_channels=channels[0])
    rest.begin(scheduler)
    rest.end(scheduler)
    assert scheduler.idle_sleeper == "its own"


def test_rank_that_receives_from_another_does_not_rest_by_itself() -> None:
    scheduler = SimpleNamespace(idle_sleeper=None, ipc_channels=SimpleNamespace(recv_from_tokenizer=None, recv_from_rpc=None))
    rest.begin(scheduler)
    assert scheduler.idle_sleeper is None
