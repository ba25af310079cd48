"""The answers of SGLang's schedulers to a front end, over a real socket at which others may connect too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from gms_sglang import rpc_answers
from gms_sglang.rpc_answers import Answers, given, parameters, send

SAID = [{"answer": 1}, {"answer": None}]


def received(*connect: Callable[[str], Any]) -> list[dict[str, Any]]:
    """What is received where these connect, one after the other."""

    async def run() -> list[dict[str, Any]]:
        with Answers(7) as answers:
            answer = asyncio.ensure_future(answers.receive())
            for one in connect:
                await asyncio.to_thread(one, answers.address)
            async with asyncio.timeout(60.0):
                return await answer

    return asyncio.run(run())


def say(data: bytes) -> Callable[[str], None]:
    def connect(address: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.settimeout(60.0)
            connection.connect("\0" + address[1:])
            connection.sendall(data)

    return connect


def schedulers(address: str) -> None:
    send(address, 7, SAID)


def test_call_arrives_as_it_was_made() -> None:
    made = parameters("promote", {"timeout_s": 1.5}, 7, "@somewhere")
    assert made.keys() == {"method", "arguments", "answer_to"}
    assert given(made["arguments"]) == ({"timeout_s": 1.5}, 7)


def test_answers_are_those_of_the_schedulers() -> None:
    assert received(schedulers) == SAID


@pytest.mark.parametrize(
    "stranger",
    [
        b"",
        b"no JSON",
        b"[]",
        b"\xff",
        json.dumps({"call": 6, "answers": [{"answer": 2}]}).encode(),
        b'{"call": 7}',
        b" " * (2 * rpc_answers.MOST_BYTES),
    ],
    ids=["nothing", "no JSON", "a list", "no text", "another call", "no answers", "too much"],
)
def test_answers_are_those_of_the_schedulers_when_somebody_else_was_faster(stranger: bytes) -> None:
    assert received(say(stranger), schedulers) == SAID


def test_answers_are_those_of_the_schedulers_when_somebody_connects_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_answers, "SAY_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        assert received(lambda address: silent.connect("\0" + address[1:]), schedulers) == SAID


def test_answers_of_another_user_are_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    users = iter([False, True])
    monkeypatch.setattr(rpc_answers, "of_this_user", lambda _: next(users))
    stranger = say(json.dumps({"call": 7, "answers": [{"answer": 2}]}).encode())
    assert received(stranger, schedulers) == SAID
