"""A read lease on what a pool has committed, whatever that is."""

from __future__ import annotations

from gms_core.client import ReadLease, Session
from gms_core.errors import GenerationNotFound, ProtocolError
from gms_core.layout import Identity

LEASE_S = 10.0
"""Seconds for a read lease: what is committed is granted at once."""


def committed(session: Session, pool: str) -> ReadLease:
    """A lease on the newest generation of a pool.

    Raises:
        GenerationNotFound: It has none.
    """
    status = next((one for one in session.status().pools if one.name == pool), None)
    if status is None or not status.generation:
        raise GenerationNotFound(f"pool {pool!r} on {session.device} has no committed generation", hint="gms pool list shows what is there.")
    lease = session.acquire(pool, "ro", Identity(status.identity), timeout_s=LEASE_S)
    if isinstance(lease, ReadLease):
        return lease
    lease.release()
    raise ProtocolError("the server gave a write lease to a reader")
