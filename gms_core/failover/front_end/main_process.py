"""With several API servers, the process that started them belongs to the engine too: it has the listening socket, and no server knows of it.

It learns which device servers there are from the first API server, over a socket in the abstract namespace that only processes of the engine know.
When it is told to end it ends the API servers at once, so it is the one that has to tell the servers before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gms_core.config import settings
from gms_core.errors import ConnectionLost, GmsError, PermissionRefused
from gms_core.failover.cohort import depart, take_place
from gms_core.protocol.peer import peer_credentials

_MOST_BYTES = 2**20
_PATIENCE_S = 30.0
_DEPART_S = 3.0


def _address(cohort: str) -> str:
    return f"\0gms-main-{cohort}"


def take_part(connect_timeout_s: float, grace_s: float) -> None:
    """In the main process: join the cohort on the servers that the first API server names, whenever it does, and leave it in order. Returns at once.

    Args:
        connect_timeout_s: Seconds to connect to each of them.
        grace_s: Seconds that the engine has to end after a signal.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        _depart_first(number, grace_s)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(_address(settings().cohort))
        listener.listen()
    except OSError:
        listener.close()
        raise
    threading.Thread(target=_serve, args=(listener, connect_timeout_s), name="gms-main-process", daemon=True).start()


def _depart_first(number: signal.Signals, grace_s: float) -> None:
    """Put the departure before whatever the process does on a signal."""
    then = signal.getsignal(number)

    def handle(received: int, frame: FrameType | None) -> None:
        telling = threading.Thread(target=depart, args=(grace_s,), name="gms-depart", daemon=True)
        telling.start()
        telling.join(_DEPART_S)  # a server that hangs must not keep the engine from ending
        signal.signal(number, then)
        signal.raise_signal(received) if not callable(then) else then(received, frame)

    signal.signal(number, handle)


def _serve(listener: socket.socket, connect_timeout_s: float) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.settimeout(_PATIENCE_S)
                answer = _answer(connection, connect_timeout_s)
            except (OSError, ValueError) as error:
                answer = str(error)
            with contextlib.suppress(OSError):
                connection.sendall(answer.encode())


def _answer(connection: socket.socket, connect_timeout_s: float) -> str:
    """Do what is asked; an empty answer says that it was done."""
    if peer_credentials(connection).uid != os.geteuid():
        return "only this user's processes may ask"
    sockets = json.loads(_read(connection))
    try:
        # It answers no request, but as long as it has the listening socket, connections can be made that nobody accepts.
        take_place("main", [Path(str(path)) for path in sockets], serves=True, connect_timeout_s=connect_timeout_s)
    except GmsError as error:
        return str(error)
    return ""


def _read(connection: socket.socket) -> bytes:
    """Everything until the other end has said all."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
        if len(data) > _MOST_BYTES:
            raise ValueError("too much was said")
    return data


def name_servers(sockets: Sequence[Path]) -> None:
    """In the first API server: make the main process join the cohort on these servers; returns once it has.

    Raises:
        PermissionRefused: It could not; the message says why.
        ConnectionLost: It does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PATIENCE_S)
            connection.connect(_address(settings().cohort))
            connection.sendall(json.dumps([str(path) for path in sockets]).encode())
            connection.shutdown(socket.SHUT_WR)
            refusal = _read(connection).decode()
    except OSError as error:
        raise ConnectionLost(f"the process that started the API servers does not answer: {error}") from error
    if refusal:
        raise PermissionRefused(f"the process that started the API servers could not join its engine's cohort: {refusal}")
