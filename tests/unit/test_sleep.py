"""What an engine unmaps while it sleeps, and maps again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.client.arena import Received, Take
from gms_core.errors import EngineAsleep, EngineUnsupported, OutOfMemory
from gms_core.kv.private import PrivateKv
from gms_core.kv.retained import RetainedKv
from gms_core.layout import Allocation, Identity
from gms_core.protocol.framing import close_descriptors
from gms_core.pytorch.kv import clearing
from gms_core.sleep import Sleeper
from gms_core.vmm.driver import Address
from gms_core.vmm.host import HostDriver
from gms_core.weights.holdings import Holding
from tests.conftest import RunningServer

CLEAR = clearing(torch.device("cpu"))
MIB = 2**20


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    opened = HostDriver(capacity=24 * MIB)
    yield opened
    opened.close()


def published(server: RunningServer) -> tuple[Session, ReadLease]:
    session = server.connect()
    writing = session.acquire("weights", "rw", Identity({}), timeout_s=10)
    assert isinstance(writing, WriteLease)
    writing.arena.allocate(MIB)
    return session, writing.commit(b"", Identity({}))


def test_nothing_is_unmapped_when_the_weights_are_not_published_yet(server: RunningServer, driver: HostDriver) -> None:
    sleeper, kv = Sleeper(), PrivateKv(driver, CLEAR, patience_s=0)
    sleeper.kv, address = (kv,), Address(kv.place(MIB))
    with server.connect() as session:
        lease = session.acquire("weights", "rw", Identity({}), timeout_s=10)
        sleeper.weights = [Holding(session, lease)]
        with pytest.raises(EngineUnsupported, match="not published"):
            sleeper.suspend()
        assert sleeper.asleep == frozenset()
        sleeper.check_awake()
        assert driver.read(address, 1) == b"\0"
    kv.close()


def test_engine_unmaps_what_is_named_when_there_are_tags(server: RunningServer, driver: HostDriver) -> None:
    sleeper, kv = Sleeper(), PrivateKv(driver, CLEAR, patience_s=0)
    sleeper.kv, _ = (kv,), kv.place(MIB)
    session, lease = published(server)
    with session:
        assert lease.arena is not None
        sleeper.weights = [Holding(session, lease)]
        sleeper.suspend(("kv_cache",))
        assert (sleeper.asleep, lease.arena.mapped, driver.memory_info().free) == ({"kv_cache"}, True, 24 * MIB)
        sleeper.suspend()
        assert (sleeper.asleep, lease.arena.mapped) == ({"kv_cache", "weights"}, False)
        with pytest.raises(EngineAsleep):
            sleeper.check_awake()
        sleeper.resume(["runtime", "workspace"])
        assert sleeper.asleep == {"kv_cache", "weights"}
        sleeper.resume(["weights"])
        assert (sleeper.asleep, lease.arena.mapped) == ({"kv_cache"}, True)
        sleeper.resume()
        assert (sleeper.asleep, driver.memory_info().free) == (frozenset(), 23 * MIB)
        lease.release()
    kv.close()


def test_kv_memory_is_kept_when_an_engine_that_fails_over_sleeps(driver: HostDriver) -> None:
    kv = RetainedKv(driver, CLEAR, [MIB - driver.granularity], MIB)  # and a granule for the mark
    sleeper, arena = Sleeper(), kv.arena
    sleeper.kv = (kv,)
    handle = driver.create(MIB)

    def receive(take: Take) -> None:
        descriptor = driver.export(handle)
        take([Received(1, MIB, descriptor)])
        close_descriptors([descriptor])

    arena.adopt(receive, [Allocation(1, 0, MIB)])
    arena.map_pool()
    driver.write(arena.base, b"kept")
    for _ in range(2):
        sleeper.suspend()
        assert arena.backing == "none"
        sleeper.resume(["kv_cache"])
        assert driver.read(arena.base, 4) == b"kept"
    arena.close()


def test_all_kv_memory_comes_back_when_the_call_is_repeated_because_there_was_no_room_for_a_part(driver: HostDriver) -> None:
    sleeper, kept, tables = Sleeper(), PrivateKv(driver, CLEAR, patience_s=0), PrivateKv(driver, CLEAR, patience_s=0)
    sleeper.kv, places = (kept, tables), [Address(kept.place(MIB)), Address(tables.place(20 * MIB))]
    sleeper.suspend()
    assert driver.memory_info().free == 24 * MIB
    taken = driver.create(10 * MIB)
    with pytest.raises(OutOfMemory):
        sleeper.resume()
    assert sleeper.asleep == {"kv_cache"}
    driver.release(taken)
    sleeper.resume()
    assert sleeper.asleep == frozenset()
    assert [driver.read(place, 1) for place in places] == [b"\0", b"\0"]
    for kv in (kept, tables):
        kv.close()
