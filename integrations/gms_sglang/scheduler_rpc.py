"""Calls of one method of every rank, over SGLang's own remote calls.

The ranks gather what each of them has to say, and the first one sends it to a socket that the call names, before the method returns
(`gms_sglang.rpc_answers`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import zmq
import zmq.asyncio
from sglang.srt.managers.io_struct import RpcReqInput, async_sock_recv, async_sock_send
from sglang.srt.utils.network import get_zmq_socket

from gms_core.errors import EngineFailed
from gms_sglang.refusals import as_error
from gms_sglang.rpc_answers import CALL, Answers, parameters

ANSWER_S = 30.0
"""Seconds that an answer may be on its way; it was sent before it is waited for."""


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
            with Answers(self._calls) as answers:
                answer = asyncio.ensure_future(answers.receive())
                try:
                    request = RpcReqInput(method=CALL, parameters=parameters(method, arguments, self._calls, answers.address))
                    await async_sock_send(self._socket, request)
                    reply = await async_sock_recv(self._socket)
                    if not reply.success:
                        raise EngineFailed(f"the engine's schedulers cannot {method}: {reply.message}")
                    async with asyncio.timeout(ANSWER_S):
                        return _values(await answer)
                except TimeoutError:
                    raise EngineFailed(f"the engine's schedulers have done what they were asked ({method}), and said nothing of it") from None
                finally:
                    answer.cancel()


def _values(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    for answer in answers:
        if (error := answer.get("error")) is not None:
            raise as_error(error)
    return [answer["answer"] for answer in answers]
