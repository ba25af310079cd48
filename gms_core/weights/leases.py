"""Who publishes and who attaches: one answer for all ranks of an engine, so that two engines that start at once never wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.engine_config import GmsConfig
from gms_core.engine_log import log
from gms_core.errors import ConfigurationError, ConnectionLost, GmsError, IdentityMismatch
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

    Args:
        session: With the server of this rank's device.
        pool: Of this rank's weights.
        identity: Of the weights that it needs.
        options: The user's.
        ranks: Finds all that compute together; None if there is one.

    Raises:
        ConfigurationError: The ranks, which may be on several machines, were given different modes.
        IdentityMismatch: What is published for one rank is of another checkpoint than what is published for another one.
        GmsError: The lease was not granted; see `gms_core.client.Session.acquire`.
    """
    start = time.perf_counter()
    group = ranks()
    if group is None:
        lease = _ask(session, pool, identity, options, options.mode)
    else:
        _check_modes(group.all_gather_object(options.mode))
        lease = _ask_as_one(session, pool, identity, options, group)
        try:
            _check_contents(group.all_gather_object(_content(lease)))
        except BaseException:
            lease.release()
            raise
    return Granted(lease, time.perf_counter() - start)


def _ask_as_one(session: Session, pool: str, identity: Identity, options: GmsConfig, group: Ranks) -> WriteLease | ReadLease:
    """Ask with one mode on all ranks.

    If they may write, the first rank asks, and the others ask for what it was given: a writer publishes only once all its ranks are ready, so an
    engine that writes on one device and waits on another could wait for ever. If the first rank was given what is published, and another rank's
    server has nothing, which happens where a server was started anew, or a writer died while it published, all of them write.
    """
    if options.mode == "ro":
        return _ask(session, pool, identity, options, options.mode)
    decided, lease = _decide(session, pool, identity, options, options.mode, group)
    if decided == "ro":
        there = group.all_gather_object(_is_there(session, pool))
        if not all(there):
            empty = ", ".join(str(rank) for rank, found in enumerate(there) if not found)
            log().warning("nothing is published for rank %s of this engine, so all of its ranks publish", empty)
            if lease is not None:
                lease.release()
            decided, lease = _decide(session, pool, identity, options, "rw", group)
    return _ask(session, pool, identity, options, decided) if lease is None else lease


def _decide(
    session: Session, pool: str, identity: Identity, options: GmsConfig, mode: Mode, group: Ranks
) -> tuple[Mode, WriteLease | ReadLease | None]:
    """What the first rank was given: the mode, and on that rank the lease."""
    if group.rank_in_group != 0:
        decided = group.broadcast_object(None, src=0)
        if decided is None:
            raise ConnectionLost("the first rank of this engine was not granted a lease; its log says why")
        return decided, None
    try:
        lease = _ask(session, pool, identity, options, mode)
    except BaseException:
        group.broadcast_object(None, src=0)
        raise
    return group.broadcast_object("rw" if isinstance(lease, WriteLease) else "ro", src=0), lease


def _is_there(session: Session, pool: str) -> bool:
    """Whether something is published in a pool, or is about to be."""
    return any(found.name == pool and found.state in ("committed", "writing") for found in session.status().pools)


def _check_modes(modes: Sequence[Mode]) -> None:
    if len(set(modes)) > 1:
        raise ConfigurationError(f"the ranks of this engine were given different modes: {_listed(modes)}", hint="Give all nodes the same block gms.")


def _content(lease: WriteLease | ReadLease) -> str:
    """Digest of the checkpoint that is published, empty if it is unknown, or if this rank publishes."""
    return lease.layout.identity.fields.get("content", "") if isinstance(lease, ReadLease) else ""


def _check_contents(contents: Sequence[str]) -> None:
    """Refuse to compute with parts of different checkpoints."""
    if len({content for content in contents if content}) > 1:
        raise IdentityMismatch(
            f"what is published for the ranks of this engine is not of one checkpoint: {_listed(contents)}",
            hint="Start an engine with mode rw once: it publishes anew for all ranks.",
        )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))


def _ask(session: Session, pool: str, identity: Identity, options: GmsConfig, mode: Mode) -> WriteLease | ReadLease:
    def waiting(reason: str) -> None:
        log().info("waiting for pool %s on %s, at most %.0f s: %s", pool, session.device, options.acquire_timeout_s, reason)

    try:
        return session.acquire(pool, mode, identity, timeout_s=options.acquire_timeout_s, on_wait=waiting, memory_timeout_s=options.memory_timeout_s)
    except GmsError as error:
        log().error("no lease on pool %s of %s in mode %s: %s", pool, session.device, mode, error)
        raise
