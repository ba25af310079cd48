"""Publish and read plain bytes, as short as it can be said."""

from gms_core.client import WriteLease
from gms_core.layout import Identity

MODEL = Identity({"content": "abc", "dtype": "bf16"})
PAGE = 4096


def publish(session, data, pool="weights", identity=MODEL, manifest=b"manifest", slab=16 * PAGE, mode="rw"):
    """Write ``data`` and commit it; returns the read lease."""
    lease = session.acquire(pool, mode, identity, timeout_s=10, slab_bytes=slab)
    assert isinstance(lease, WriteLease)
    offset = lease.arena.allocate(len(data))
    session.driver.write(lease.arena.address(offset), data)
    return lease.commit(manifest, identity)


def read_all(session, lease, size):
    arena = lease.map()
    return session.driver.read(arena.base, size)
