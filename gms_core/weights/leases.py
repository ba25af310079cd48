"""Who publishes and who attaches: one answer for all ranks of an engine, so that two engines that start at once never wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.engine_config import GmsConfig
from gms_core.engine_log import log
from gms_core.errors import ConnectionLost, GmsError
from gms_core.layout import Identity
from gms_core.protocol.messages import Mode
from gms_core.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease, and what waiting for it took."""

    lease: WriteLease | ReadLease
    wait_seconds: float


def acquire(session: Session, pool: str, identity: Identity, options: GmsConfig, ranks: Callable[[], Ranks | None]) -> Granted:
    """Get this rank's lease.

    With several ranks and mode ``auto`` the first rank asks, and the others ask for what it was given: a writer publishes only once all its ranks are
    ready, so an engine that writes on one device and waits on another could wait for ever.

    Args:
        session: With the server of this rank's device.
        pool: Of this rank's weights.
        identity: Of the weights that it needs.
        options: The user's.
        ranks: Finds all that compute together; None if there is one. It is asked where they have to agree.

    Raises:
        GmsError: The lease was not granted; see `gms_core.client.Session.acquire`.
    """
    start = time.perf_counter()
    group = ranks() if options.mode == "auto" else None
    if group is None:
        lease = _ask(session, pool, identity, options, options.mode)
    elif group.rank_in_group == 0:
        try:
            lease = _ask(session, pool, identity, options, options.mode)
        except BaseException:
            group.broadcast_object(None, src=0)
            raise
        group.broadcast_object("rw" if isinstance(lease, WriteLease) else "ro", src=0)
    else:
        decided = group.broadcast_object(None, src=0)
        if decided is None:
            raise ConnectionLost("the first rank of this engine was not granted a lease; its log says why")
        lease = _ask(session, pool, identity, options, decided)
    return Granted(lease, time.perf_counter() - start)


def _ask(session: Session, pool: str, identity: Identity, options: GmsConfig, mode: Mode) -> WriteLease | ReadLease:
    def waiting(reason: str) -> None:
        log().info("waiting for pool %s on %s, at most %.0f s: %s", pool, session.device, options.acquire_timeout_s, reason)

    try:
        return session.acquire(pool, mode, identity, timeout_s=options.acquire_timeout_s, on_wait=waiting, memory_timeout_s=options.memory_timeout_s)
    except GmsError as error:
        log().error("no lease on pool %s of %s in mode %s: %s", pool, session.device, mode, error)
        raise
