"""What `Status` tells of a server, its pools and its sessions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from gms_core import __version__
from gms_core.events import Kind
from gms_core.protocol.messages import PoolStatus, SessionStatus, StatusReport
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
    return PoolStatus(
        name=pool.name,
        state="writing" if draft and not committed else "committed" if committed else "empty",
        generation=committed.generation if committed else 0,
        digest=committed.digest if committed else "",
        identity=committed.identity.fields if committed else {},
        allocations=len(committed.allocations) if committed else 0,
        bytes=committed.size if committed else 0,
        draft_bytes=sum(draft.sizes.values()) if draft else 0,
        retired_bytes=sum(layout.size for layout in pool.retired.values()),
        readers=tuple(sorted(pool.readers)),
        writer=draft.session if draft else 0,
        waiting=tuple(waiter.session for waiter in pool.queue),
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
