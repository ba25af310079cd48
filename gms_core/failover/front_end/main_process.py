"""With several API servers, the process that started them belongs to the engine too: it has the listening socket, and no server knows of it.

It learns which device servers there are from the first API server, as `gms_core.failover.front_end.named` has it. When it is told to end it ends the
API servers at once, so it is the one that has to tell the servers before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gms_core.failover.cohort import depart
from gms_core.failover.front_end.named import Order, be_told, tell

_MAIN = "main"
_DEPART_S = 3.0


def take_part(grace_s: float) -> None:
    """In the main process: join the cohort on the servers that the first API server names, whenever it does, and leave it in order. Returns at once.

    Args:
        grace_s: Seconds that the engine has to end after a signal.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        _depart_first(number, grace_s)
    # It answers no request, but as long as it has the listening socket, connections can be made that nobody accepts.
    be_told(_MAIN, serves=True)


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


def name_servers(sockets: Sequence[Path], connect_timeout_s: float) -> None:
    """In the first API server: make the main process join the cohort on these servers; returns once it has.

    Args:
        sockets: Of the servers.
        connect_timeout_s: Seconds to connect to each of them.

    Raises:
        PermissionRefused: It could not; the message says why.
        ConnectionLost: It does not answer.
    """
    tell_main(Order(tuple(map(str, sockets)), connect_timeout_s))


def tell_main(order: Order) -> None:
    """In an API server: have the main process do something; returns once it has. An empty order asks whether it still does what it is told.

    Raises:
        PermissionRefused: It could not; the message says why.
        ConnectionLost: It does not answer.
    """
    tell(_MAIN, 0, order)
