"""Publish and read plain bytes, as short as it can be said."""

import time

from gms_core.client import PoolGenerations, WriteLease
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


def generations(session):
    """Number, whether committed, whether pinned, and readers of each generation of the weights."""
    return [(one.generation, one.committed, one.pinned, len(one.readers)) for one in PoolGenerations(session, "weights").all()]


def until(condition, patience_s=30.0):
    """Wait for what another process or thread does."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
