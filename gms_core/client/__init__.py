"""The client: sessions, leases and arenas.

`connect` opens a session; `Session.acquire` gives a `WriteLease` or a `ReadLease`; their `Arena` is the memory, mapped into this process.
"""

from gms_core.client.arena import Arena
from gms_core.client.lease import ReadLease, WriteLease
from gms_core.client.session import Session, connect

__all__ = ["Arena", "ReadLease", "Session", "WriteLease", "connect"]
