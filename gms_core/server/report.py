"""What `Status` tells of pools and sessions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from gms_core.protocol.messages import PoolStatus, SessionStatus
from gms_core.protocol.peer import PeerCredentials
from gms_core.server.effects import SessionId
from gms_core.server.published import PublishedPool


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
