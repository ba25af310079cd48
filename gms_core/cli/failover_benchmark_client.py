"""A client of the OpenAI-compatible port that engines share: it tells apart how a request can fail, and asks again at once."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from gms_core.errors import AcquireTimeout, InvalidArgument

REPLY_S = 120.0
"""Seconds that a connection may be silent."""
RETRY_S = 0.001

Token = int | str
Tokens = tuple[Token, ...]
Outcome = Literal["answered", "refused", "broken", "rejected"]
"""Refused: nobody listened. Broken: the connection ended without a whole answer. Rejected: the answer was an error."""

_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}  # noqa: S104 - names to be replaced, nothing is bound
_WORDS = range(10, 250)
"""Token ids that every vocabulary has."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine answers."""

    host: str
    port: int

    def connect(self) -> http.client.HTTPConnection:
        """A connection to be made."""
        return http.client.HTTPConnection(self.host, self.port, timeout=REPLY_S)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        detail: Of what went wrong, in words.
    """

    outcome: Outcome
    tokens: Tokens = ()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """The first answer after some tries.

    Attributes:
        asked_at: When it was asked for, on the monotonic clock.
        at: When it had come.
        failures: How the tries before it ended.
    """

    asked_at: float
    at: float
    tokens: Tokens
    failures: Counter[Outcome] = field(default_factory=Counter)


def endpoint_of(command: Sequence[str], default_port: int) -> Endpoint:
    """Where the engine of a command line will answer, by its ``--host`` and ``--port``.

    Args:
        command: All its words.
        default_port: Where it does if it says nothing of a port.

    Raises:
        InvalidArgument: It has no port that all engines could share.
    """
    if next(_values(command, "--uds"), None) is not None:
        raise InvalidArgument("the benchmark measures a TCP port, and the command has --uds", hint="Give the engine a --port instead.")
    port = next(_values(command, "--port"), str(default_port))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidArgument(f"the command's port is {port!r}", hint="All engines share one port here: write a number.")
    host = next(_values(command, "--host"), "")
    return Endpoint(_EVERYWHERE.get(host, host), int(port))


def _values(command: Sequence[str], name: str) -> Iterator[str]:
    for index, word in enumerate(command):
        given, equals, value = word.partition("=")
        if given == name:
            yield from [value] if equals else command[index + 1 : index + 2]


def check_unused(endpoint: Endpoint) -> None:
    """Refuse an address at which somebody answers already: it would be measured instead of the engines.

    Raises:
        InvalidArgument: Somebody does, or there is no such address.
    """
    try:
        with socket.create_connection((endpoint.host, endpoint.port), timeout=2.0):
            pass
    except ConnectionRefusedError:
        return
    except OSError as error:
        raise InvalidArgument(f"{endpoint} cannot be used: {error}", hint="Look at --host in the command.") from error
    raise InvalidArgument(f"something answers at {endpoint} already", hint="Choose another --port in the command, or end what runs there.")


def prompt(seed: int, number: int, length: int) -> list[int]:
    """A prompt, as ids of tokens, that is the same each time."""
    return random.Random(f"{seed} {number}").choices(_WORDS, k=length)  # noqa: S311 - to be repeated, not to be secret


def model_name(endpoint: Endpoint) -> str | None:
    """The name under which the engine serves its model; None while it does not answer."""
    with closing(endpoint.connect()) as connection:
        try:
            connection.request("GET", "/v1/models")
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException):
            return None
    return str(json.loads(text)["data"][0]["id"]) if reply.status == http.HTTPStatus.OK else None


def complete(endpoint: Endpoint, model: str, words: Sequence[int], count: int) -> Answer:
    """Ask for so many tokens, chosen greedily."""
    with closing(endpoint.connect()) as connection:
        refusal = _send(connection, model, words, count, stream=False)
        if refusal is not None:
            return refusal
        try:
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException) as error:
            return Answer("broken", detail=str(error))
    if reply.status != http.HTTPStatus.OK:
        return Answer("rejected", detail=f"{reply.status}: {text.decode(errors='replace')}")
    return Answer("answered", _tokens(json.loads(text)))


def stream(endpoint: Endpoint, model: str, words: Sequence[int], count: int, on_tokens: Callable[[], None]) -> Answer:
    """As `complete`, in pieces: ``on_tokens`` is called whenever there are some more."""
    found: list[Token] = []
    with closing(endpoint.connect()) as connection:
        refusal = _send(connection, model, words, count, stream=True)
        if refusal is not None:
            return refusal
        try:
            reply = connection.getresponse()
            if reply.status != http.HTTPStatus.OK:
                return Answer("rejected", detail=f"{reply.status}: {reply.read().decode(errors='replace')}")
            for line in reply:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return Answer("answered", tuple(found))
                if data:
                    piece = json.loads(data)
                    if "error" in piece:
                        return Answer("rejected", tuple(found), str(piece["error"]))
                    found.extend(_tokens(piece))
                    on_tokens()
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            return Answer("broken", tuple(found), str(error))
    return Answer("broken", tuple(found), "the stream ended early")


def _send(connection: http.client.HTTPConnection, model: str, words: Sequence[int], count: int, *, stream: bool) -> Answer | None:
    """Connect, and send a request; an answer if that was not possible."""
    body = {
        "model": model,
        "prompt": list(words),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    try:
        connection.connect()
    except ConnectionRefusedError as error:
        return Answer("refused", detail=str(error))
    except OSError as error:
        return Answer("broken", detail=str(error))
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    except (OSError, http.client.HTTPException) as error:
        return Answer("broken", detail=str(error))
    return None


def _tokens(answer: dict[str, Any]) -> Tokens:
    """The tokens of an answer, or of a piece of one: their ids, or their letters if the engine does not tell the ids."""
    choices = answer.get("choices") or [{}]
    ids = choices[0].get("token_ids")
    return tuple(ids) if ids is not None else tuple(choices[0].get("text", ""))


def first_answer(
    endpoint: Endpoint,
    model: Callable[[], str | None],
    words: Sequence[int],
    *,
    patience_s: float,
    pause_s: float = RETRY_S,
    check: Callable[[], None] = lambda: None,
) -> FirstAnswer:
    """Ask for one token, with a fresh connection each time, until somebody answers.

    Args:
        endpoint: Whom.
        model: Gives the model's name once it is known.
        words: The prompt.
        patience_s: Seconds to try.
        pause_s: Seconds between the end of a try and the next one.
        check: Called between the tries; it raises to end them.

    Raises:
        AcquireTimeout: Nobody has answered.
    """
    failures: Counter[Outcome] = Counter()
    last = "nobody listened"
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        name = model()
        if name is not None:
            asked = time.monotonic()
            answer = complete(endpoint, name, words, 1)
            if answer.outcome == "answered":
                return FirstAnswer(asked, time.monotonic(), answer.tokens, failures)
            failures[answer.outcome] += 1
            last = answer.detail or last
        check()
        time.sleep(pause_s)
    raise AcquireTimeout(f"nobody has answered at {endpoint} within {patience_s:g} s; the last try: {last}")
