"""Sealed memory: what is added by a driver whose `seal` returns True."""

from __future__ import annotations

import pytest

from driver_contract.harness import DriverTests, exported, mapped, written
from gms_core.errors import DriverError
from gms_core.vmm.driver import Access, Address, Driver


class SealingContract(DriverTests):
    """What is added by a driver whose `seal` returns True."""

    def test_writer_becomes_a_reader_when_memory_is_sealed(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        with mapped(driver, handle, size) as address:
            driver.write(address, b"draft")
            assert driver.seal(handle)
            assert driver.seal(handle)
            driver.write(address, b"final")
            driver.set_access(address, size, Access.READ)
            assert driver.read(address, 5) == b"final"
            for _ in range(2):
                with pytest.raises(DriverError, match="sealed"):
                    driver.set_access(address, size, Access.READ_WRITE)
            with pytest.raises(DriverError, match="access"):
                driver.write(address, b"x")
            assert driver.read(address, 5) == b"final"

    def test_whole_range_stays_as_it_was_when_one_memory_in_it_is_sealed(self, driver: Driver, size: int) -> None:
        open_memory, sealed = driver.create(size), driver.create(size)
        assert driver.seal(sealed)
        address = driver.reserve(2 * size)
        driver.map(address, size, open_memory)
        driver.map(Address(address + size), size, sealed)
        driver.set_access(address, 2 * size, Access.READ)
        with pytest.raises(DriverError, match="sealed"):
            driver.set_access(address, 2 * size, Access.READ_WRITE)
        with pytest.raises(DriverError, match="access"):
            driver.write(address, b"x")
        driver.unmap(address, 2 * size)
        driver.free_reservation(address, 2 * size)

    def test_no_process_can_write_when_memory_is_sealed(self, driver: Driver, size: int) -> None:
        handle = written(driver, size, b"published")
        assert driver.seal(handle)
        body = """
import mmap
handle = driver.import_descriptor(descriptor, size)
address = driver.reserve(size)
driver.map(address, size, handle)
refused = 0
try:
    driver.set_access(address, size, Access.READ_WRITE)
except DriverError:
    refused += 1
driver.set_access(address, size, Access.READ)
libc = ctypes.CDLL(None, use_errno=True)
refused += libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 3) == -1 and ctypes.get_errno() == 13
for attempt in (
    lambda: mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    lambda: os.pwrite(descriptor, b"x", 0),
    lambda: os.ftruncate(descriptor, 0),
):
    try:
        attempt()
    except OSError:
        refused += 1
again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
try:
    mmap.mmap(again, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
except OSError:
    refused += 1
print(refused, driver.read(address, 9).decode())
"""
        with exported(driver, handle) as descriptor:
            result = self.in_child(body, size, descriptor)
        assert result.stdout.strip() == "6 published", result.stderr

    def test_kernel_refuses_mprotect_when_the_writers_own_mapping_was_turned_read_only(self, driver: Driver, size: int) -> None:
        body = """
handle = driver.import_descriptor(descriptor, size)
address = driver.reserve(size)
driver.map(address, size, handle)
driver.set_access(address, size, Access.READ_WRITE)
driver.write(address, b"by the writer")
assert driver.seal(handle)
driver.set_access(address, size, Access.READ)
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 3), ctypes.get_errno(), driver.read(address, 13).decode())
"""
        with exported(driver, driver.create(size)) as descriptor:
            result = self.in_child(body, size, descriptor)
        assert result.stdout.strip() == "-1 13 by the writer", result.stderr
