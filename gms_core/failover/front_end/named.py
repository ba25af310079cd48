"""Processes of an engine that no rank can speak to: the first API server names them the device servers, over sockets that only the engine knows.

They are in the abstract namespace, under the cohort's name: nothing is left of them, and nobody else knows what they are called.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gms_core.config import settings
from gms_core.engine_log import log
from gms_core.errors import ConnectionLost, GmsError, PermissionRefused
from gms_core.failover.cohort import settle, take_place
from gms_core.protocol.peer import peer_credentials

PATIENCE_S = 120.0
"""Seconds until a process has to answer: on a busy machine it may still be importing its engine."""
_AGAIN_S = 0.05
_MOST_BYTES = 2**20

Calls = Mapping[str, Callable[..., Any]]
"""What such a process can be asked besides, by name: functions whose arguments and results JSON can hold."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What such a process is told.

    Attributes:
        sockets: Of the servers on which it has to join the cohort.
        connect_timeout_s: Seconds to connect to each.
        settle: Whether it has to put its host memory into huge pages.
        call: Which of its calls it has to make after that; empty for none.
        arguments: Of the call.
    """

    sockets: tuple[str, ...] = ()
    connect_timeout_s: float = 10.0
    settle: bool = False
    call: str = ""
    arguments: tuple[Any, ...] = ()


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it answers: why it could not, or what the call has returned."""

    refusal: str = ""
    result: Any = None


def be_told(who: str, *, serves: bool, calls: Calls | None = None) -> None:
    """Do in this process what the first API server says, whenever it does. Returns at once.

    Args:
        who: Which of the engine's processes this is, and its name in the cohort. A further process of the same name gets a number.
        serves: Whether clients can reach it.
        calls: What it can be asked besides; one at a time. Whoever asks for nothing is answered meanwhile.

    Raises:
        OSError: It cannot listen.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    number = 0
    try:
        while not _bound(listener, _address(who, number)):
            number += 1
        listener.listen()
    except OSError:
        listener.close()
        raise
    name = f"{who} {number}" if number else who
    threading.Thread(target=_serve, args=(listener, name, serves, calls or {}), name="gms-told", daemon=True).start()


def tell(who: str, number: int, order: Order, patience_s: float | None = None) -> Any:
    """Say something to such a process; returns once it has done it. Blocks until the process has come so far that it listens.

    Args:
        who: Which of the engine's processes.
        number: Which of those of this name, from 0.
        order: What it has to do.
        patience_s: Seconds for it to answer; None for `PATIENCE_S`.

    Returns:
        What the call has returned; None if there was none.

    Raises:
        PermissionRefused: It could not; the message says why.
        ConnectionLost: It does not answer.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    deadline = time.monotonic() + patience_s
    while True:
        try:
            answer = _ask(_address(who, number), order, patience_s)
            break
        except ConnectionRefusedError as error:
            if time.monotonic() >= deadline:
                raise ConnectionLost(f"the engine's process {who} does not answer: {error}") from error
            time.sleep(_AGAIN_S)
        except OSError as error:
            raise ConnectionLost(f"the engine's process {who} does not answer: {error}") from error
        except ValueError as error:  # msgspec's errors are ValueErrors
            raise ConnectionLost(f"the engine's process {who} has ended while it answered: {error}") from error
    if answer.refusal:
        raise PermissionRefused(f"the engine's process {who} could not do as it was told: {answer.refusal}")
    return answer.result


def of_this_user(connection: socket.socket) -> bool:
    """Whether the other end of a connection is a process of the user who runs this one. In the abstract namespace everybody can connect."""
    return peer_credentials(connection).uid == os.geteuid()


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other end has said all.

    Raises:
        ValueError: It is more than anybody has to say here.
    """
    data = b""
    while piece := connection.recv(65536):
        data += piece
        if len(data) > _MOST_BYTES:
            raise ValueError("too much was said")
    return data


def _address(who: str, number: int) -> str:
    return f"\0gms-{who}-{number}-{settings().cohort}"


def _bound(listener: socket.socket, address: str) -> bool:
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _ask(address: str, order: Order, patience_s: float) -> _Answer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience_s)
        connection.connect(address)
        connection.sendall(msgspec.json.encode(order))
        connection.shutdown(socket.SHUT_WR)
        return msgspec.json.decode(read_all(connection), type=_Answer)


def _serve(listener: socket.socket, name: str, serves: bool, calls: Calls) -> None:
    joining, calling = threading.Lock(), threading.Lock()

    def obey(order: Order) -> _Answer:
        """Do what is asked."""
        try:
            with joining:
                take_place(name, _paths(order.sockets), serves=serves, connect_timeout_s=order.connect_timeout_s)
        except GmsError as error:
            return _Answer(str(error))
        if order.settle:
            settle(name)
        if not order.call:
            return _Answer()
        with calling:
            return _called(calls, order)

    while True:
        connection, _ = listener.accept()
        # A call may take as long as another engine takes to end, and whoever looks for a process that hangs must not take that for one.
        threading.Thread(target=_answer, args=(connection, obey), name="gms-told", daemon=True).start()


def _answer(connection: socket.socket, obey: Callable[[Order], _Answer]) -> None:
    with connection:
        try:
            connection.settimeout(PATIENCE_S)
            if of_this_user(connection):
                answer = obey(msgspec.json.decode(read_all(connection), type=Order))
            else:
                answer = _Answer("only this user's processes may ask")
            said = msgspec.json.encode(answer)
        except (OSError, TypeError, ValueError) as error:  # msgspec's errors are ValueErrors, but for results that JSON cannot hold
            said = msgspec.json.encode(_Answer(str(error)))
        with contextlib.suppress(OSError):
            connection.sendall(said)


def _called(calls: Calls, order: Order) -> _Answer:
    if order.call not in calls:
        return _Answer(f"nobody can ask it for {order.call!r}")
    try:
        return _Answer(result=calls[order.call](*order.arguments))
    except Exception as error:  # noqa: BLE001 - it is told to whoever has asked
        log().exception("%s has failed", order.call)
        return _Answer(str(error) or type(error).__name__)


def _paths(sockets: Sequence[str]) -> list[Path]:
    return [Path(socket) for socket in sockets]
