"""Which lease a rank of an engine gets on the weights that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.engine_config import GmsConfig
from gms_core.engine_log import log
from gms_core.errors import AcquireTimeout, GmsError
from gms_core.layout import Identity
from gms_core.protocol.messages import Mode
from gms_core.ranks import Ranks
from gms_core.weights.group_lease import GroupLease


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease, and what waiting for it took."""

    lease: WriteLease | ReadLease
    wait_seconds: float


def acquire(session: Session, pool: str, identity: Identity, options: GmsConfig, ranks: Callable[[], Ranks | None]) -> Granted:
    """Get this rank's lease.

    Args:
        session: With the server of this rank's device.
        pool: Of this rank's weights.
        identity: Of the weights that it needs.
        options: The user's.
        ranks: Finds all that compute together; None if there is one.

    Raises:
        ConfigurationError: The ranks, which may be on several machines, were given different modes.
        IdentityMismatch: What is published for one rank is of another checkpoint than what is published for another one.
        GmsError: The lease was not granted, or that of another rank; see `gms_core.client.Session.acquire`.
    """
    start = time.perf_counter()
    asking = _Asking(session, pool, identity, options)
    group = ranks()
    try:
        if group is None:
            lease = asking(options.mode, options.acquire_timeout_s)
        else:
            lease = GroupLease(session, pool, asking, options.mode, options.acquire_timeout_s, group).acquire()
    except GmsError as error:
        log().error("no lease on pool %s of %s in mode %s: %s", pool, session.device, options.mode, error)
        raise
    return Granted(lease, time.perf_counter() - start)


class _Asking:
    """Asks for leases on one pool, and tells the log what it waits for, and for whom."""

    def __init__(self, session: Session, pool: str, identity: Identity, options: GmsConfig) -> None:
        self._session, self._pool, self._identity, self._options = session, pool, identity, options
        self._said = ""

    def __call__(self, mode: Mode, timeout_s: float, *, replace: int | None = None) -> WriteLease | ReadLease:
        """As `gms_core.client.Session.acquire`."""
        memory_timeout_s = self._options.memory_timeout_s
        try:
            return self._session.acquire(
                self._pool, mode, self._identity, timeout_s=timeout_s, on_wait=self._waiting, replace=replace, memory_timeout_s=memory_timeout_s
            )
        except AcquireTimeout as error:
            if not timeout_s or not (writer := self._writer()):
                raise
            self._say(f"the writer is {writer}")
            raise AcquireTimeout(f"{error.message}; the writer is {writer}", hint=error.hint, details=error.details) from error

    def _waiting(self, reason: str) -> None:
        self._say(f"waiting for pool {self._pool} on {self._session.device}, at most {self._options.acquire_timeout_s:.0f} s: {reason}")

    def _writer(self) -> str:
        """Whoever writes the pool; empty if nobody does."""
        report = self._session.status()
        writers = {pool.writer for pool in report.pools if pool.name == self._pool}
        return ", ".join(f"{session.client} (pid {session.pid})" for session in report.sessions if session.id in writers)

    def _say(self, sentence: str) -> None:
        if sentence != self._said:
            self._said = sentence
            log().info("%s", sentence)
