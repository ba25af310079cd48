"""Who publishes and who attaches: one answer for all ranks of an engine, so that two engines that start at once never wait for each other."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.engine_config import GmsConfig
from gms_core.errors import ConnectionLost, GmsError
from gms_core.layout import Identity
from gms_core.protocol.messages import Mode
from gms_vllm.place import pool_name

log = logging.getLogger("vllm.gms")


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease, and what waiting for it took."""

    lease: WriteLease | ReadLease
    wait_seconds: float


def acquire(config: Any, options: GmsConfig, session: Session, identity: Identity) -> Granted:
    """Get this rank's lease.

    With several ranks and mode ``auto`` the first rank asks, and the others ask for what it was given: a writer publishes only once all its ranks are
    ready, so an engine that writes on one device and waits on another could wait for ever.

    Raises:
        GmsError: The lease was not granted; see `gms_core.client.Session.acquire`.
    """
    mode: Mode = options.mode
    start = time.perf_counter()
    group = all_ranks() if mode == "auto" else None
    if group is None:
        lease = _ask(config, options, session, identity, mode)
    elif group.rank_in_group == 0:
        try:
            lease = _ask(config, options, session, identity, mode)
        except BaseException:
            group.broadcast_object(None, src=0)
            raise
        group.broadcast_object("rw" if isinstance(lease, WriteLease) else "ro", src=0)
    else:
        decided = group.broadcast_object(None, src=0)
        if decided is None:
            raise ConnectionLost("the first rank of this engine was not granted a lease; its log says why")
        lease = _ask(config, options, session, identity, decided)
    return Granted(lease, time.perf_counter() - start)


def all_ranks() -> Any:
    """The group of all ranks that compute together, if there are several; else None."""
    from vllm.distributed.parallel_state import get_world_group

    world = get_world_group()
    return world if world.world_size > 1 else None


def _ask(config: Any, options: GmsConfig, session: Session, identity: Identity, mode: Mode) -> WriteLease | ReadLease:
    pool = pool_name(config, options)

    def waiting(reason: str) -> None:
        log.info("waiting for pool %s on %s, at most %.0f s: %s", pool, session.device, options.acquire_timeout_s, reason)

    try:
        return session.acquire(
            pool,
            mode,
            identity,
            timeout_s=options.acquire_timeout_s,
            on_wait=waiting,
            memory_timeout_s=options.memory_timeout_s,
        )
    except GmsError as error:
        log.error("no lease on pool %s of %s in mode %s: %s", pool, session.device, mode, error)
        raise
