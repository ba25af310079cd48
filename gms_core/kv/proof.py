"""The wait, beside the work of a rank, for the proof that every process of the last holder has exited."""

from __future__ import annotations

import threading
from typing import Literal

from gms_core.client import RetainedPool
from gms_core.engine_log import log
from gms_core.errors import AcquireTimeout

AGAIN_S = 60.0
"""Seconds between two lines of the log that tell who is still there."""
ProofState = Literal["waiting", "proven", "failed"]


class Proof:
    """Waits in a thread of its own until all of a pool may be mapped of which the front is held.

    It waits for as long as it takes: the engine serves already, and a process that is slow to exit must not use up one engine after the other.

    Args:
        pool: Which one.

    Attributes:
        state: ``waiting``, ``proven``, or ``failed`` if it will never be there.
        failure: Why it failed, in words.
    """

    def __init__(self, pool: RetainedPool) -> None:
        self.state: ProofState = "waiting"
        self.failure = ""
        self._pool = pool
        threading.Thread(target=self._wait, name="gms-proof", daemon=True).start()

    def _wait(self) -> None:
        try:
            while not self._proven():
                pass
        except Exception as error:  # noqa: BLE001 - told to whoever asks
            self.failure = str(error)
            self.state = "failed"
            log().error("pool %s: the rest of the memory will not be granted: %s", self._pool.name, error)
        else:
            self.state = "proven"

    def _proven(self) -> bool:
        try:
            self._pool.await_whole(AGAIN_S)
        except AcquireTimeout as error:
            log().warning("pool %s: this engine goes on with its first blocks: %s", self._pool.name, error)
            return False
        return True
