"""Rest for the schedulers of an engine that stands by: SGLang's look for requests all the time, and each would take a processor from the primary.

`--sleep-on-idle` does it for the whole life of an engine, and lengthens the way of a request. Here it ends with the promotion.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import zmq

_NAP_MS = 1000
"""At most; whatever arrives ends it at once."""


class Rest:
    """What a scheduler calls when it has nothing to do: returns once something has arrived, or after a while.

    Args:
        sockets: By which something can arrive.
    """

    def __init__(self, sockets: Iterable[zmq.Socket[Any]]) -> None:
        self._poller = zmq.Poller()
        for socket in sockets:
            self._poller.register(socket, zmq.POLLIN)

    def maybe_sleep(self) -> None:
        """See `sglang.srt.managers.scheduler.Scheduler.maybe_sleep_on_idle`."""
        self._poller.poll(_NAP_MS)


def begin(scheduler: Any) -> None:
    """Let a scheduler rest while it has nothing to do. The ranks that wait for another one for what has arrived rest already."""
    sockets = scheduler.ipc_channels.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc
    if scheduler.idle_sleeper is None and None not in sockets:
        scheduler.idle_sleeper = Rest(sockets)


def end(scheduler: Any) -> None:
    """Let a scheduler be as its options have it."""
    if isinstance(scheduler.idle_sleeper, Rest):
        scheduler.idle_sleeper = None
