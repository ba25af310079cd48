"""Calls of one method of every rank, over SGLang's own remote calls.

What SGLang sends back is whether a method has returned, and carries no value. So the ranks gather what each of them has to say, and the first one
sends it to a socket that the call names, before the method returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

import zmq
import zmq.asyncio
from sglang.srt.managers.io_struct import RpcReqInput, async_sock_recv, async_sock_send
from sglang.srt.utils.network import get_zmq_socket

from gms_core.errors import EngineFailed, rebuild
from gms_core.failover.front_end.named import of_this_user

METHOD = "gms_call"
"""Of SGLang's scheduler; `scheduler_calls` attaches it."""
ANSWER_S = 30.0
"""Seconds that an answer may be on its way; it was sent before it is waited for."""
MOST_BYTES = 2**20
"""Of an answer; more is none."""
ABSTRACT = "@"
"""How the name of a socket begins that is in no directory."""


class SchedulerRpc:
    """The ranks of an engine, asked from its first API server. It belongs to the event loop that it is made in."""

    def __init__(self, rpc_ipc_name: str) -> None:
        """Prepare to be asked.

        Args:
            rpc_ipc_name: Of SGLang's ``PortArgs``: there the schedulers connect to. Nothing else of a server uses it.
        """
        self._socket: Any = get_zmq_socket(zmq.asyncio.Context(1), zmq.DEALER, rpc_ipc_name, True)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._turn = asyncio.Lock()
        self._calls = 0

    async def ask(self, method: str, arguments: Mapping[str, Any] | None = None) -> list[Any]:
        """Have every rank do something, one call after the other.

        If the waiting task is cancelled, the call goes on, and those after it wait for its end.

        Args:
            method: What; see `scheduler_calls`.
            arguments: Of it.

        Returns:
            What each rank answers, in their order.

        Raises:
            GmsError: The error of the first rank that has failed.
            EngineFailed: The schedulers do not know the call.
        """
        return await asyncio.shield(asyncio.ensure_future(self._ask(method, arguments or {})))

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    async def _ask(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        async with self._turn:
            self._calls += 1
            name = f"gms-answer-{os.getpid()}-{self._calls}-{secrets.token_hex(8)}"
            parameters = {"method": method, "arguments": json.dumps({**arguments, "call": self._calls}), "answer_to": ABSTRACT + name}
            with contextlib.closing(_listen(name)) as listener:
                answer = asyncio.ensure_future(_receive(listener))
                try:
                    await async_sock_send(self._socket, RpcReqInput(method=METHOD, parameters=parameters))
                    reply = await async_sock_recv(self._socket)
                    if not reply.success:
                        raise EngineFailed(f"the engine's schedulers cannot {method}: {reply.message}")
                    async with asyncio.timeout(ANSWER_S):
                        said = await answer
                    return _answers(said, self._calls)
                except TimeoutError:
                    raise EngineFailed(f"the engine's schedulers have done what they were asked ({method}), and said nothing of it") from None
                finally:
                    answer.cancel()


def _listen(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(f"\0{name}")
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


async def _receive(listener: socket.socket) -> bytes:
    """All that the first rank says. Everybody can see the socket's name, so whoever else connects is let go."""
    loop = asyncio.get_running_loop()
    while True:
        connection, _ = await loop.sock_accept(listener)
        with connection:
            if not of_this_user(connection):
                continue
            data = b""
            while len(data) <= MOST_BYTES and (piece := await loop.sock_recv(connection, 65536)):
                data += piece
            return data


def _answers(data: bytes, call: int) -> list[Any]:
    said = json.loads(data)
    if said["call"] != call:
        raise EngineFailed(f"the engine's schedulers have answered call {said['call']} in the place of {call}")
    for answer in said["answers"]:
        if (error := answer.get("error")) is not None:
            raise rebuild(error["code"], error["message"], error.get("hint", ""), {})
    return [answer["answer"] for answer in said["answers"]]
