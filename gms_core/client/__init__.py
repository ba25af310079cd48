"""The client: sessions, leases and arenas.

`connect` opens a session; `Session.acquire` gives a `WriteLease` or a `ReadLease`; their `Arena` is the memory, mapped into this process.
`PoolGenerations` pins generations, rolls them back and waits for the next one. A process
of an engine that fails over has a `Membership` in its cohort, a `RetainedPool` for memory that outlives it, and a `RetainedArena` for its addresses.
"""

from gms_core.client.arena import Arena
from gms_core.client.generations import PoolGenerations
from gms_core.client.lease import ReadLease, WriteLease
from gms_core.client.membership import Membership
from gms_core.client.retained import RetainedPool
from gms_core.client.retained_arena import RetainedArena
from gms_core.client.session import Session, connect

__all__ = ["Arena", "Membership", "PoolGenerations", "ReadLease", "RetainedArena", "RetainedPool", "Session", "WriteLease", "connect"]
