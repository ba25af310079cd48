"""Waiting for what NIXL has under way: it has no call that waits, so it is asked, less and less often, until a deadline."""

from __future__ import annotations

import errno
import os
import time
from typing import NamedTuple

from gms_core.snapshot.backends.nixl_agents import Agent, Handle

DEADLINE_S = 120
_SHORTEST_S = 50e-6
_LONGEST_S = 1e-3

_hung: list[object] = []


def hang(what: object) -> None:
    """Keep what has something under way that does not end, to the end of the process: its agent, its handles and its buffers."""
    _hung.append(what)


class Patience:
    """Waits, a little longer each time, until a deadline has passed without anything that has ended.

    Args:
        seconds: From one end to the next.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._is_over = False
        self.renew()

    def renew(self) -> None:
        """Something has ended, or begun. Once it was in vain there is no more of it: an end is waited for once, and not again on the way out."""
        if self._is_over:
            return
        self._until = time.monotonic() + self._seconds
        self._pause = _SHORTEST_S

    def wait(self) -> None:
        """Let a moment pass.

        Raises:
            OSError: The deadline has.
        """
        if self._is_over or time.monotonic() >= self._until:
            self._is_over = True
            raise OSError(errno.ETIME, os.strerror(errno.ETIME))
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_S)


class Request(NamedTuple):
    """What an agent has under way."""

    agent: Agent
    handle: Handle

    def end(self, patience: Patience) -> None:
        """Wait for its end.

        Raises:
            NixlError: It has failed.
            OSError: It does not end.
        """
        patience.renew()
        while not self.agent.has_ended(self.handle):
            patience.wait()
