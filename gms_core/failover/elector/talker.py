"""The thread of an elector that speaks with the store, which may take its time, and tells what came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gms_core.errors import GmsError, LockStoreUnavailable
from gms_core.failover.elector.store import LockStore, Owned
from gms_core.failover.elector.validity import Validity, renewal_pause_s

AGAIN_S = 0.5
"""Seconds after which a store is asked again that did not answer."""


@dataclass(frozen=True, slots=True)
class Had:
    """The lock was taken or renewed, by a question that was asked at a time."""

    term: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """It is somebody else's, or nobody knows."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """It was ours, and nobody knows whether it still is."""

    reason: str


@dataclass(frozen=True, slots=True)
class Gone:
    """It is not ours any more."""


@dataclass(frozen=True, slots=True)
class Impossible:
    """It can never be ours."""

    error: GmsError


Fact = Had | Waiting | Unknown | Gone | Impossible


class Talker:
    """Takes a lock, then renews it until it is told to stop."""

    def __init__(self, store: LockStore, ttl_s: float, clock: Callable[[], float], tell: Callable[[Fact], None]) -> None:
        """Prepare; `start` begins.

        Args:
            store: Of the lock; from now on the thread's, until `stop` has returned.
            ttl_s: The lock's time to live.
            clock: Tells the time.
            tell: Called in the thread with each fact; it must be quick.
        """
        self._store, self._ttl_s, self._clock, self._tell = store, ttl_s, clock, tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gms-elector", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask nothing more; returns whether the store is nobody's now: its last answer may not have come within some seconds."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        term = self._take()
        while term and not self._stop.wait(renewal_pause_s(self._ttl_s)):
            asked_at = self._clock()
            try:
                fact: Fact = Had(term, asked_at) if self._store.renew() else Gone()
            except GmsError as error:
                fact = Unknown(str(error))
            self._tell(fact)
            if isinstance(fact, Gone):
                return

    def _take(self) -> int:
        """Returns the term, or 0 if there is to be none."""
        while not self._stop.is_set():
            asked_at = self._clock()
            try:
                outcome = self._store.take()
                if not isinstance(outcome, Owned) and Validity(self._ttl_s, asked_at).has_ended(self._clock()):
                    self._store.release()  # this process slept meanwhile
                    continue
            except LockStoreUnavailable as error:
                self._tell(Waiting(str(error)))
                self._stop.wait(AGAIN_S)
            except GmsError as error:
                self._tell(Impossible(error))
                return 0
            else:
                if not isinstance(outcome, Owned):
                    self._tell(Had(outcome.term, asked_at))
                    return outcome.term
                self._tell(Waiting(f"{outcome.owner} has the lock"))
                self._stop.wait(self._store.look_s)
        return 0
