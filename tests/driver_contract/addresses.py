"""Virtual addresses: reservations, mappings and their access."""

from __future__ import annotations

import array
from concurrent.futures import ThreadPoolExecutor

import pytest

from driver_contract.harness import DriverTests, exported, mapped, written
from gms_core.errors import DriverError, InvalidArgument
from gms_core.vmm.driver import Access, Address, Driver


class AddressContract(DriverTests):
    # Reservations and mappings

    def test_addresses_are_aligned_when_they_are_reserved(self, driver: Driver, size: int) -> None:
        address = driver.reserve(size)
        assert address % driver.granularity == 0
        driver.free_reservation(address, size)

    def test_reservation_costs_no_memory_when_it_is_large(self, driver: Driver) -> None:
        large = 2**38 // driver.granularity * driver.granularity
        before = driver.memory_info().free
        address = driver.reserve(large)
        assert driver.memory_info().free > before - 2**30
        driver.free_reservation(address, large)

    def test_reservation_stays_when_a_mapping_is_left_in_it(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        with mapped(driver, handle, size) as address:
            with pytest.raises(DriverError, match="mapping"):
                driver.free_reservation(address, size)
            driver.write(address, b"still here")
            assert driver.read(address, 10) == b"still here"

    def test_reservation_is_given_back_whole_when_it_is_freed(self, driver: Driver, size: int) -> None:
        address, unit = driver.reserve(size), driver.granularity
        for start, length in ((address, unit), (address + unit, unit), (address, 2 * size)):
            with pytest.raises(DriverError, match="reservation"):
                driver.free_reservation(Address(start), length)
        driver.free_reservation(address, size)
        with pytest.raises(DriverError, match="reservation"):
            driver.free_reservation(address, size)

    def test_mapping_is_refused_when_the_range_is_not_free_reserved_or_aligned(self, driver: Driver, size: int) -> None:
        unit = driver.granularity
        other = driver.create(size)
        address = driver.reserve(3 * unit)
        handle = written(driver, size, b"first")
        driver.map(address, size, handle)
        driver.set_access(address, size, Access.READ)
        outside = driver.reserve(size)
        driver.free_reservation(outside, size)
        for wrong in (address, address + unit, address + 2 * unit, outside):
            with pytest.raises(DriverError):
                driver.map(Address(wrong), size, other)
        with pytest.raises(InvalidArgument):
            driver.map(Address(address + unit // 2), size, other)
        assert driver.read(address, 5) == b"first"
        last = driver.create(unit)
        driver.map(Address(address + size), unit, last)
        driver.unmap(address, 3 * unit)
        driver.free_reservation(address, 3 * unit)

    def test_mapping_is_refused_when_it_is_not_the_whole_memory(self, driver: Driver, size: int) -> None:
        handle, unit = driver.create(size), driver.granularity
        address = driver.reserve(2 * size)
        for wrong in (unit, size + unit):
            with pytest.raises(DriverError, match="whole"):
                driver.map(address, wrong, handle)
        driver.map(address, size, handle)
        driver.unmap(address, size)
        driver.free_reservation(address, 2 * size)

    def test_mapping_stays_when_unmap_would_cut_through_it(self, driver: Driver, size: int) -> None:
        unit = driver.granularity
        first, second = written(driver, size, b"first"), written(driver, size, b"second")
        address = driver.reserve(3 * size)
        driver.map(address, size, first)
        driver.map(Address(address + size), size, second)
        driver.set_access(address, 2 * size, Access.READ)
        for start, length in ((address, unit), (address + unit, unit), (address, size + unit), (address + unit, size), (address, 3 * size)):
            with pytest.raises(DriverError):
                driver.unmap(Address(start), length)
            with pytest.raises(DriverError):
                driver.set_access(Address(start), length, Access.READ_WRITE)
        assert driver.read(address, 5) == b"first"
        assert driver.read(Address(address + size), 6) == b"second"
        with pytest.raises(DriverError):
            driver.write(address, b"no")
        driver.unmap(address, 2 * size)
        with pytest.raises(DriverError, match="mapped"):
            driver.unmap(address, size)
        driver.free_reservation(address, 3 * size)

    def test_contents_and_address_stay_when_memory_is_unmapped_and_mapped_again(self, driver: Driver, size: int) -> None:
        first, second = written(driver, size, b"first"), written(driver, size, b"second")
        address = driver.reserve(2 * size)
        for _ in range(3):
            driver.map(address, size, first)
            driver.map(Address(address + size), size, second)
            driver.set_access(address, 2 * size, Access.READ)
            assert driver.read(address, 5) == b"first"
            assert driver.read(Address(address + size), 6) == b"second"
            driver.unmap(address, 2 * size)
            with pytest.raises(DriverError, match="mapped"):
                driver.read(address, 5)
        driver.free_reservation(address, 2 * size)

    def test_rest_of_a_range_stays_when_one_mapping_in_it_is_replaced(self, driver: Driver, size: int) -> None:
        handles = [written(driver, size, name) for name in (b"a", b"b", b"c", b"new")]
        address = driver.reserve(3 * size)
        for place in range(3):
            driver.map(Address(address + place * size), size, handles[place])
        driver.set_access(address, 3 * size, Access.READ)
        middle = Address(address + size)
        driver.unmap(middle, size)
        driver.map(middle, size, handles[3])
        driver.set_access(middle, size, Access.READ)
        assert [driver.read(Address(address + place * size), 1) for place in range(3)] == [b"a", b"n", b"c"]
        driver.unmap(address, 3 * size)
        driver.free_reservation(address, 3 * size)

    def test_all_places_show_one_memory_when_it_is_mapped_many_times(self, driver: Driver, size: int) -> None:
        handle, times = driver.create(size), 48
        address = driver.reserve(times * size)
        for place in range(times):
            driver.map(Address(address + place * size), size, handle)
        driver.set_access(address, times * size, Access.READ_WRITE)
        driver.write(Address(address + 17 * size), b"alias")
        driver.synchronize()
        assert {driver.read(Address(address + place * size), 5) for place in range(times)} == {b"alias"}
        real = written(driver, size, b"real!")
        driver.unmap(address, times * size)
        driver.map(address, size, real)
        driver.set_access(address, size, Access.READ)
        assert driver.read(address, 5) == b"real!"
        driver.unmap(address, size)
        driver.free_reservation(address, times * size)

    def test_no_call_disturbs_another_when_threads_use_one_driver(self, driver: Driver, size: int) -> None:
        def work(mine: bytes) -> None:
            for _ in range(20):
                handle = driver.create(size)
                with mapped(driver, handle, size) as address:
                    driver.write(address, mine)
                    assert driver.read(address, 1) == mine
                driver.release(handle)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, [bytes([number]) for number in range(4)]))

    # Access

    def test_memory_cannot_be_touched_when_it_has_no_access_yet(self, driver: Driver, size: int) -> None:
        handle = written(driver, size, b"closed")
        address = driver.reserve(size)
        driver.map(address, size, handle)
        with pytest.raises(DriverError, match="access"):
            driver.read(address, 1)
        with pytest.raises(DriverError, match="access"):
            driver.write(address, b"x")
        driver.set_access(address, size, Access.READ)
        assert driver.read(address, 6) == b"closed"
        driver.set_access(address, size, Access.NONE)
        with pytest.raises(DriverError, match="access"):
            driver.read(address, 1)
        driver.unmap(address, size)
        driver.free_reservation(address, size)
        with exported(driver, handle) as descriptor:
            self.check_refused(self.in_child("address = imported(None)\n" + self.raw_read, size, descriptor))

    def test_access_is_a_right_of_the_mapping_when_memory_is_mapped_twice(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        with mapped(driver, handle, size) as writable, mapped(driver, handle, size, Access.READ) as readable:
            with pytest.raises(DriverError, match="access"):
                driver.write(readable, b"no")
            driver.write(writable, b"yes")
            assert driver.read(readable, 3) == b"yes"

    def test_write_is_refused_when_the_mapping_is_read_only(self, driver: Driver, size: int) -> None:
        handle = written(driver, size, b"safe")
        with exported(driver, handle) as descriptor:
            can_read = self.in_child("address = imported(Access.READ)\n" + self.raw_read, size, descriptor)
            assert can_read.stdout.strip() == "touched", can_read.stderr
            self.check_refused(self.in_child("address = imported(Access.READ)\n" + self.raw_write, size, descriptor))
        with mapped(driver, handle, size, Access.READ) as address:
            assert driver.read(address, 4) == b"safe"

    def test_write_is_refused_again_when_a_writable_mapping_becomes_read_only(self, driver: Driver, size: int) -> None:
        body = "address = imported(Access.READ_WRITE)\ndriver.write(address, b'w')\ndriver.set_access(address, size, Access.READ)\n"
        with exported(driver, driver.create(size)) as descriptor:
            self.check_refused(self.in_child(body + self.raw_write, size, descriptor))

    def test_bytes_arrive_when_they_are_copied_across_several_mappings(self, driver: Driver, size: int) -> None:
        address = driver.reserve(4 * size)
        for place in range(4):
            driver.map(Address(address + place * size), size, driver.create(size))
        driver.set_access(address, 4 * size, Access.READ_WRITE)
        data = array.array("I", range(2 * size // 4)).tobytes()
        driver.write(address, data)
        driver.copy(Address(address + 2 * size), address, 2 * size)
        assert driver.read(Address(address + 2 * size), 2 * size) == data
        driver.set_access(Address(address + 3 * size), size, Access.READ)
        with pytest.raises(DriverError, match="access"):
            driver.copy(Address(address + 2 * size), address, 2 * size)
        assert driver.read(address, 0) == b""
        driver.unmap(address, 4 * size)
        driver.free_reservation(address, 4 * size)
