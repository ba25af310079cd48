"""What all tests on a GPU need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gms_core.devices import list_gpus
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Access, Driver
from tests.gpu.story import used_gib


@pytest.fixture(scope="session", autouse=True)
def asked_once() -> None:
    """NVML opens a socket for itself when a process first asks it something, and keeps it: that is nothing that a test has left behind."""
    used_gib()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """It keeps the device's context for all of a module: the sockets that CUDA opens for it are nothing that a test has left behind."""
    driver = open_driver(list_gpus()[0].id)
    handle = driver.create(driver.granularity)
    address = driver.reserve(driver.granularity)
    driver.map(address, driver.granularity, handle)
    driver.set_access(address, driver.granularity, Access.READ_WRITE)
    driver.read(address, 1)
    yield driver
    driver.unmap(address, driver.granularity)
    driver.free_reservation(address, driver.granularity)
    driver.release(handle)
    driver.close()
