"""What `Status` tells of a server, its pools and its sessions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import msgspec
from msgspec.structs import replace

from gms_core import __version__
from gms_core.events import Kind
from gms_core.protocol.framing import MAX_PAYLOAD
from gms_core.protocol.messages import GenerationStatus, PoolStatus, SessionStatus, StatusReport
from gms_core.protocol.peer import PeerCredentials
from gms_core.server.effects import SessionId
from gms_core.server.observer import Observer
from gms_core.server.published import PublishedPool
from gms_core.server.state import State

if TYPE_CHECKING:
    from gms_core.server.service import Service


class Reported(Protocol):
    """What a session tells of itself."""

    @property
    def id(self) -> SessionId:
        """Its number."""

    @property
    def peer(self) -> PeerCredentials:
        """Who connected."""

    @property
    def client(self) -> str:
        """What it calls itself."""

    @property
    def since(self) -> float:
        """When it was opened, on the monotonic clock."""

    @property
    def waiting_for(self) -> str:
        """What it waits for, in words."""

    @property
    def detached(self) -> bool:
        """Whether its client has not come back yet."""


def pool_status(pool: PublishedPool) -> PoolStatus:
    """One pool as it is now."""
    committed, draft = pool.committed, pool.draft
    readers = pool.generations.readers_by_generation()
    return PoolStatus(
        name=pool.name,
        state="committed" if committed else "writing" if draft else "retired" if pool.generations.retired else "empty",
        generation=committed.generation if committed else 0,
        digest=committed.digest if committed else "",
        identity=committed.identity.fields if committed else {},
        allocations=len(committed.allocations) if committed else 0,
        bytes=committed.size if committed else 0,
        draft_bytes=sum(draft.sizes.values()) if draft else 0,
        retired_bytes=pool.generations.retired_bytes,
        readers=tuple(sorted(pool.readers)),
        writer=draft.session if draft else 0,
        waiting=tuple(waiter.session for waiter in pool.queue),
        generations=tuple(
            GenerationStatus(
                generation=generation,
                committed=layout is committed,
                digest=layout.digest,
                identity=layout.identity.fields,
                bytes=layout.size,
                readers=tuple(readers.get(generation, ())),
                pinned=generation in pool.generations.pins,
            )
            for generation, layout in sorted(pool.generations.all().items())
        ),
    )


def session_status(session: Reported, pools: Iterable[PublishedPool]) -> SessionStatus:
    """One session as it is now."""
    return SessionStatus(
        id=session.id,
        pid=session.peer.pid,
        uid=session.peer.uid,
        client=session.client,
        age_s=time.monotonic() - session.since,
        leases={pool.name: lease for pool in pools if (lease := pool.lease_of(session.id))},
        waiting_for=session.waiting_for,
        away=session.detached,
    )


async def status_report(service: Service, *, brief: bool) -> StatusReport:
    """A server's state at one instant.

    Args:
        service: The server's.
        brief: Whether to leave out the sessions.
    """
    return _within(await _whole_report(service, brief=brief), MAX_PAYLOAD)


async def _whole_report(service: Service, *, brief: bool) -> StatusReport:
    info = await service.memory.info()
    published, waits = service.published.pools, service.memory.waits()
    sessions = [] if brief else sorted(service.sessions.items())
    return StatusReport(
        server=__version__,
        pid=os.getpid(),
        device=service.device,
        driver=service.memory.driver.name,
        uptime_s=time.monotonic() - service.started,
        memory_free=info.free,
        memory_total=info.total,
        allocated_bytes=service.memory.bytes,
        allocations=len(service.memory),
        waiting_for_memory=len(waits),
        pools=tuple(pool_status(pool) for _, pool in sorted(published.items())),
        sessions=tuple(session_status(session, published.values()) for _, session in sessions),
        retained=service.retained.status(),
        cohorts=service.engines.status(),
        locks=service.engines.lock_status(),
        ends=tuple(service.engines.ends),
        observation=service.observer.observation(len(service.sessions)),
        memory_queue=waits,
        quotas=service.accounts.status(),
    )


def _within(report: StatusReport, most: int) -> StatusReport:
    """As much of a report as so many bytes have room for: an operator has to see something just when there is too much of everything."""
    for cut in (_without_older_identities, _without_sessions, _without_generations):
        if len(msgspec.msgpack.encode(report)) <= most:
            break
        report = replace(cut(report), cut=True)
    return report


def _without_older_identities(report: StatusReport) -> StatusReport:
    pools = (
        replace(pool, generations=tuple(one if one.committed else replace(one, identity={}) for one in pool.generations)) for pool in report.pools
    )
    return replace(report, pools=tuple(pools))


def _without_sessions(report: StatusReport) -> StatusReport:
    pools = (replace(pool, readers=(), waiting=(), generations=tuple(replace(one, readers=()) for one in pool.generations)) for pool in report.pools)
    retained = (replace(pool, users=(), waiting=()) for pool in report.retained)
    return replace(report, sessions=(), pools=tuple(pools), retained=tuple(retained))


def _without_generations(report: StatusReport) -> StatusReport:
    pools = (
        replace(pool, identity={}, generations=tuple(replace(one, identity={}) for one in pool.generations if one.committed)) for pool in report.pools
    )
    return replace(report, pools=tuple(pools), retained=tuple(replace(pool, identity={}) for pool in report.retained))


def tell_of_start(observer: Observer, device: str, state: State) -> None:
    """Tell with what a server begins, and count it if one before it has not given up what it had."""
    about, version, pid = state.about, __version__, os.getpid()
    if about is None:
        observer.tell(Kind.SERVER_STARTED, device, version=version, pid=pid)
        return
    how = "adopted" if state.with_memory else "lost"
    observer.restarts = {**about.restarts, how: about.restarts.get(how, 0) + 1}
    if state.with_memory:
        allocations, sessions, engines = len(state.allocations), len(state.sessions), len(state.cohorts)
        observer.tell(Kind.SERVER_ADOPTED, device, version=version, pid=pid, allocations=allocations, sessions=sessions, engines=engines)
    else:
        observer.tell(Kind.SERVER_BEGAN_ANEW, device, version=version, pid=pid)
