"""What a front end asks SGLang's schedulers, and how their answers come back: both ends of it, for `scheduler_rpc` and `scheduler_calls`.

SGLang's remote calls carry a method and its parameters to every scheduler, and nothing back but whether it has returned. So a call names a socket, to
which the first scheduler says what all of them have to say.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Self

from gms_core.failover.front_end.named import of_this_user

CALL = "gms_call"
"""The remote call of a front end; its parameters are those of `parameters`."""
ABSTRACT = "@"
"""How the name of a socket begins that is in no directory."""
MOST_BYTES = 1 << 20
"""More than all ranks have to say."""
SAY_S = 5.0
"""Seconds that a connection may take to say all. The first scheduler connects once it knows that."""
_SEND_S = 10.0
_WAITING = 16


def parameters(method: str, arguments: Mapping[str, Any], call: int, answer_to: str) -> dict[str, str]:
    """The parameters of `CALL`.

    Args:
        method: What to do; see `scheduler_calls.Calls`.
        arguments: Of it.
        call: A number that comes back with the answers.
        answer_to: The Unix socket that is told these, abstract if it begins with ``@``.
    """
    return {"method": method, "arguments": json.dumps({**arguments, "call": call}), "answer_to": answer_to}


def given(arguments: str) -> tuple[dict[str, Any], int]:
    """The arguments of a call, and its number, which is 0 if it has none."""
    found = json.loads(arguments)
    return found, found.pop("call", 0)


def send(answer_to: str, call: int, answers: Sequence[Mapping[str, Any]]) -> None:
    """Tell a front end what all ranks have to say.

    Raises:
        OSError: It does not listen.
    """
    path = "\0" + answer_to.removeprefix(ABSTRACT) if answer_to.startswith(ABSTRACT) else answer_to
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SEND_S)
        connection.connect(path)
        connection.sendall(json.dumps({"call": call, "answers": answers}).encode())


class Answers:
    """A socket for the answers to one call. A context manager, in an event loop.

    Attributes:
        address: What to tell the schedulers.
    """

    def __init__(self, call: int) -> None:
        """Listen.

        Args:
            call: The number of the call.
        """
        name = f"gms-answer-{os.getpid()}-{call}-{secrets.token_hex(8)}"
        self.address = ABSTRACT + name
        self._call = call
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            self._listener.bind(f"\0{name}")
            self._listener.listen(_WAITING)
        except BaseException:
            self._listener.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    async def receive(self) -> list[dict[str, Any]]:
        """What each rank has to say, in their order.

        The name can be read by everybody on this machine: whoever else connects, or says something else, is not listened to.
        """
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            with connection:
                if not of_this_user(connection):
                    continue
                try:
                    async with asyncio.timeout(SAY_S):
                        said = json.loads(await _read_all(connection))
                except (TimeoutError, OSError, ValueError):
                    continue
            if isinstance(said, dict) and said.get("call") == self._call and isinstance(said.get("answers"), list):
                return list(said["answers"])


async def _read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := await asyncio.get_running_loop().sock_recv(connection, 65536):
        data += piece
        if len(data) > MOST_BYTES:
            raise ValueError("too much was said")
    return data
