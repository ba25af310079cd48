"""KV memory of an engine's own: there while it is awake, at addresses that stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from gms_core.errors import OutOfMemory
from gms_core.kv.private import PrivateKv
from gms_core.pytorch.kv import clearing
from gms_core.vmm.driver import Address
from gms_core.vmm.host import HostDriver

CLEAR = clearing(torch.device("cpu"))
MIB = 2**20


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    opened = HostDriver(capacity=24 * MIB)
    yield opened
    opened.close()


def test_kv_memory_is_zero_at_the_same_addresses_when_it_comes_back(driver: HostDriver) -> None:
    kv = PrivateKv(driver, CLEAR, patience_s=0)
    addresses = [kv.place(size) for size in (MIB, 3 * MIB)]
    assert (kv.size, driver.memory_info().free) == (4 * MIB, 20 * MIB)
    driver.write(Address(addresses[1]), b"\x07" * MIB)
    kv.suspend()
    kv.suspend()
    assert driver.memory_info().free == 24 * MIB
    kv.resume()
    kv.resume()
    assert driver.memory_info().free == 20 * MIB
    assert driver.read(Address(addresses[1]), 3 * MIB) == bytes(3 * MIB)
    kv.close()


def test_wake_up_waits_when_another_still_has_the_memory(driver: HostDriver) -> None:
    kv = PrivateKv(driver, CLEAR, patience_s=60)
    address = Address(kv.place(20 * MIB))
    kv.suspend()
    taken = driver.create(10 * MIB)
    failed = threading.Event()
    create = driver.create

    def noticed(size: int) -> object:
        try:
            return create(size)
        except OutOfMemory:
            failed.set()
            raise

    driver.create = noticed  # type: ignore[assignment, method-assign]
    waking = threading.Thread(target=kv.resume)
    waking.start()
    assert failed.wait(60)
    driver.release(taken)
    waking.join()
    assert driver.read(address, 1) == b"\0"
    kv.close()


def test_wake_up_is_refused_and_can_be_repeated_when_no_memory_comes_free(driver: HostDriver) -> None:
    kv = PrivateKv(driver, CLEAR, patience_s=0)
    kv.place(8 * MIB)
    address = Address(kv.place(12 * MIB))
    kv.suspend()
    taken = driver.create(10 * MIB)
    with pytest.raises(OutOfMemory):
        kv.resume()
    driver.release(taken)
    kv.resume()
    assert driver.read(address, 1) == b"\0"
    kv.close()
