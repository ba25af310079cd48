"""Processes of an engine that no rank can speak to join its cohort once they are told where, against a real server."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import pytest

from gms_core.errors import ConfigurationError, ConnectionLost, PermissionRefused
from gms_core.failover.front_end import named
from gms_core.failover.front_end.gate import bind_port
from gms_core.failover.front_end.named import Order, tell
from tests.conftest import RunningServer
from tests.unit.failover_processes import Told, told_processes

PROGRAM = """
import json, sys, threading
from gms_core.failover.front_end.named import be_told


def fail():
    raise RuntimeError("it is broken")

def wait():
    print(json.dumps({"waits": True}), flush=True)
    threading.Event().wait()

be_told(sys.argv[1], serves=False, calls={"wait": wait, "add": lambda one, other: {"sum": one + other}, "fail": fail})
print(json.dumps({"listens": True}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Told]]:
    """Starts a helper of one engine; returns once it can be told something."""
    monkeypatch.setenv("GMS_COHORT", "told")
    monkeypatch.setenv("GMS_ENGINE", "engine-7")
    with told_processes() as begin:

        def helper() -> Told:
            process = begin(PROGRAM, "helper")
            process.until_key("listens")
            return process

        yield helper


def joined(server: RunningServer) -> dict[str, str]:
    """Processes that have joined a cohort, and whose it is."""
    with server.connect() as session:
        return {member.process: cohort.engine for cohort in session.status().cohorts for member in cohort.members}


def test_processes_of_one_name_join_with_numbers_when_each_is_told(server: RunningServer, start: Callable[[], Told]) -> None:
    helpers = [start(), start()]
    order = Order((str(server.socket),))
    for number in (0, 1, 0):  # once more: it is there already
        tell("helper", number, order)
    assert joined(server) == {"helper": "engine-7", "helper 1": "engine-7"}
    helpers[1].signal(signal.SIGKILL)
    assert helpers[0].wait() == -signal.SIGKILL


def test_process_settles_and_joins_nothing_when_it_is_told_to(server: RunningServer, start: Callable[[], Told]) -> None:
    start()
    tell("helper", 0, Order(settle=True))
    assert joined(server) == {}


def test_caller_is_told_why_when_a_process_cannot_join(start: Callable[[], Told], tmp_path: Path) -> None:
    start()
    with pytest.raises(PermissionRefused, match=r"helper could not do as it was told: .*none\.sock"):
        tell("helper", 0, Order((str(tmp_path / "none.sock"),)))


def test_call_is_answered_and_its_error_told(start: Callable[[], Told]) -> None:
    start()
    assert tell("helper", 0, Order(call="add", arguments=(1, 2))) == {"sum": 3}
    for call, sentence in (("fail", "it is broken"), ("subtract", "nobody can ask it for 'subtract'")):
        with pytest.raises(PermissionRefused, match=sentence):
            tell("helper", 0, Order(call=call))
    assert tell("helper", 0, Order()) is None


def test_process_answers_while_a_call_goes_on_and_the_caller_is_told_when_it_ends_then(start: Callable[[], Told]) -> None:
    helper = start()
    with futures.ThreadPoolExecutor() as threads:
        calling = threads.submit(tell, "helper", 0, Order(call="wait"))
        helper.until_key("waits")
        tell("helper", 0, Order())
        assert not calling.done()
        helper.kill()
        with pytest.raises(ConnectionLost, match="helper"):
            calling.result(30)


def test_caller_is_told_when_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "PATIENCE_S", 0.05)
    monkeypatch.setenv("GMS_COHORT", "nobody")
    with pytest.raises(ConnectionLost, match="helper does not answer"):
        tell("helper", 0, Order())


def test_words_that_nobody_understands_are_answered_and_others_still_heard(server: RunningServer, start: Callable[[], Told]) -> None:
    start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect("\0gms-helper-0-told")
        connection.sendall(b"join")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096) != b""
    tell("helper", 0, Order((str(server.socket),)))
    assert joined(server) == {"helper": "engine-7"}


def test_port_is_shared_until_somebody_listens() -> None:
    with bind_port("127.0.0.1", 0, shared=True) as first:
        port = first.getsockname()[1]
        with bind_port("localhost", port, shared=True):
            pass
        first.listen()
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port} cannot be had"):
            bind_port("127.0.0.1", port, shared=False)


def test_port_is_refused_when_there_is_no_such_host() -> None:
    with pytest.raises(ConfigurationError, match="cannot be had"):
        bind_port("no-such-host.invalid", 1, shared=True)
