"""Physical memory: how long it lives, who sees it, and how much of it there is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from driver_contract.harness import PRELUDE, DriverTests, exported, mapped, open_descriptors, written
from gms_core.errors import AllocationTooLarge, DriverError, InvalidArgument, OutOfMemory
from gms_core.vmm.driver import Access, Descriptor, Driver

CREATOR = """
import socket
handle = driver.create(size)
address = driver.reserve(size)
driver.map(address, size, handle)
driver.set_access(address, size, Access.READ_WRITE)
driver.write(address, b"kept")
socket.send_fds(socket.socket(fileno=descriptor), [b"x"], [driver.export(handle)])
sys.stdin.read()
"""

LIFE_AND_DEATH = b"written before the death of everyone who mapped it"


class MemoryContract(DriverTests):
    # Life of memory

    def test_memory_is_seen_when_another_process_imports_its_descriptor(self, driver: Driver, size: int) -> None:
        with exported(driver, written(driver, size, b"from the first process")) as descriptor:
            result = self.in_child("print(driver.read(imported(Access.READ), 22).decode())", size, descriptor)
        assert result.stdout.strip() == "from the first process", result.stderr

    def test_write_is_seen_when_another_process_has_made_it(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        with exported(driver, handle) as descriptor, mapped(driver, handle, size, Access.READ) as address:
            result = self.in_child("driver.write(imported(Access.READ_WRITE), b'from the child')", size, descriptor)
            assert result.returncode == 0, result.stderr
            assert driver.read(address, 14) == b"from the child"

    def test_memory_lives_when_only_a_descriptor_is_left(self, driver: Driver, size: int) -> None:
        handle = written(driver, size, LIFE_AND_DEATH)
        with exported(driver, handle) as descriptor:
            driver.release(handle)
            again = driver.import_descriptor(descriptor, size)
        with mapped(driver, again, size, Access.READ) as address:
            assert driver.read(address, len(LIFE_AND_DEATH)) == LIFE_AND_DEATH

    def test_memory_lives_when_only_a_mapping_is_left(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        with mapped(driver, handle, size) as address:
            driver.release(handle)
            driver.write(address, LIFE_AND_DEATH)
            assert driver.read(address, len(LIFE_AND_DEATH)) == LIFE_AND_DEATH

    def test_memory_lives_when_its_creator_was_killed(self, driver: Driver, size: int) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", PRELUDE + CREATOR, self.device, str(size), str(theirs.fileno())]
        with ours, subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),)) as creator:
            theirs.close()
            _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
            creator.kill()
            creator.wait()
        handle = driver.import_descriptor(Descriptor(descriptor), size)
        with mapped(driver, handle, size, Access.READ) as address:
            assert driver.read(address, 4) == b"kept"
        result = self.in_child("print(driver.read(imported(Access.READ), 4).decode())", size, descriptor)
        os.close(descriptor)
        assert result.stdout.strip() == "kept", result.stderr

    def test_memory_is_free_again_when_its_last_descriptor_is_closed(self, driver: Driver) -> None:
        size = 32 * driver.granularity
        before = driver.memory_info().free
        handle = driver.create(size)
        descriptor = driver.export(handle)
        driver.release(handle)
        assert driver.memory_info().free <= before - size // 2
        os.close(descriptor)
        assert driver.memory_info().free > before - size // 2

    def test_memory_is_free_again_when_its_last_mapping_is_gone(self, driver: Driver) -> None:
        size = 32 * driver.granularity
        before = driver.memory_info().free
        handle = driver.create(size)
        with mapped(driver, handle, size):
            driver.release(handle)
            assert driver.memory_info().free <= before - size // 2
        assert driver.memory_info().free > before - size // 2

    def test_memory_is_not_free_when_another_process_still_maps_it(self, driver: Driver) -> None:
        size = 32 * driver.granularity
        before = driver.memory_info().free
        handle = driver.create(size)
        body = "address = imported(Access.READ); os.close(descriptor); print('mapped', flush=True); sys.stdin.read()"
        with exported(driver, handle) as descriptor:
            command = [sys.executable, "-c", PRELUDE + body, self.device, str(size), str(descriptor)]
            reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(descriptor,))
        with reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"mapped\n"
            driver.release(handle)
            assert driver.memory_info().free <= before - size // 2
            reader.kill()
            reader.wait()
        assert driver.memory_info().free > before - size // 2

    def test_total_is_that_of_all_memory(self, driver: Driver) -> None:
        assert driver.total_bytes == driver.memory_info().total

    def test_handles_are_released_when_the_driver_is_closed(self, driver: Driver) -> None:
        size = 32 * driver.granularity
        before = driver.memory_info().free
        handle = driver.create(size)
        driver.close()
        driver.close()
        assert driver.memory_info().free > before - size // 2
        with pytest.raises(DriverError, match="handle"):
            driver.release(handle)

    def test_descriptors_do_not_add_up_when_memory_comes_and_goes(self, driver: Driver, size: int) -> None:
        def cycle() -> int:
            handle = driver.create(size)
            with exported(driver, handle) as descriptor:
                imported = driver.import_descriptor(descriptor, size)
            with mapped(driver, imported, size):
                driver.release(imported)
            driver.release(handle)
            return len(open_descriptors())

        cycle()
        after_warming_up = cycle()
        assert max(cycle() for _ in range(20)) <= after_warming_up

    # Handles and descriptors

    def test_descriptor_is_closed_on_exec_when_memory_is_exported(self, driver: Driver, size: int) -> None:
        with exported(driver, driver.create(size)) as descriptor:
            assert not os.get_inheritable(descriptor)

    def test_each_export_is_a_descriptor_of_its_own_when_memory_is_exported_twice(self, driver: Driver, size: int) -> None:
        handle = written(driver, size, b"same")
        with exported(driver, handle) as first, exported(driver, handle) as second:
            assert first != second
            again = driver.import_descriptor(second, size)
        with mapped(driver, again, size, Access.READ) as address:
            assert driver.read(address, 4) == b"same"

    def test_descriptor_stays_the_callers_when_it_is_imported(self, driver: Driver, size: int) -> None:
        with exported(driver, driver.create(size)) as descriptor:
            for handle in [driver.import_descriptor(descriptor, size) for _ in range(3)]:
                driver.release(handle)
            os.fstat(descriptor)

    def test_both_mappings_show_the_same_bytes_when_memory_is_imported_by_its_creator(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        with exported(driver, handle) as descriptor:
            imported = driver.import_descriptor(descriptor, size)
        with mapped(driver, handle, size) as first, mapped(driver, imported, size, Access.READ) as second:
            driver.write(first, b"one memory")
            assert driver.read(second, 10) == b"one memory"

    def test_export_is_refused_when_memory_was_imported(self, driver: Driver, size: int) -> None:
        with exported(driver, driver.create(size)) as descriptor:
            imported = driver.import_descriptor(descriptor, size)
        with pytest.raises(DriverError, match="imported"):
            driver.export(imported)

    def test_handle_is_refused_when_it_was_released(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        driver.release(handle)
        address = driver.reserve(size)
        for call in (driver.release, driver.export, driver.seal, lambda gone: driver.map(address, size, gone)):
            with pytest.raises(DriverError, match="handle"):
                call(handle)
        driver.free_reservation(address, size)

    def test_import_is_refused_when_the_descriptor_is_closed(self, driver: Driver, size: int) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.close(writing)
        with pytest.raises(DriverError):
            driver.import_descriptor(Descriptor(writing), size)

    def test_import_is_refused_when_the_descriptor_is_no_memory(self, driver: Driver, size: int) -> None:
        reading, writing = os.pipe()
        body = "try:\n    driver.import_descriptor(descriptor, size)\nexcept DriverError:\n    print('refused')"
        result = self.in_child(body, size, writing)
        os.close(reading)
        os.close(writing)
        assert result.stdout.strip() == "refused", result.stderr

    # Sizes and room

    @pytest.mark.parametrize("pages", [0, -1, 0.5, 1.5])
    def test_size_is_refused_when_it_is_no_positive_multiple_of_the_granularity(self, driver: Driver, pages: float) -> None:
        wrong = int(pages * driver.granularity)
        for call in (driver.create, driver.reserve, lambda size: driver.import_descriptor(Descriptor(0), size)):
            with pytest.raises(InvalidArgument, match="multiple"):
                call(wrong)

    def test_size_is_refused_when_the_device_can_never_have_it(self, driver: Driver) -> None:
        before = driver.memory_info()
        unit = driver.granularity
        with pytest.raises(AllocationTooLarge):
            driver.create((before.total // unit + 1) * unit)
        assert driver.memory_info().free > before.free - 32 * unit

    def test_memory_is_refused_when_there_is_no_room_now(self, driver: Driver) -> None:
        unit = driver.granularity
        most = driver.memory_info().free // unit * unit * 9 // 10 // unit * unit
        handle = driver.create(most)
        with pytest.raises(OutOfMemory) as refused:
            driver.create(most)
        assert not isinstance(refused.value, AllocationTooLarge)
        assert refused.value.retryable
        driver.release(handle)
        driver.release(driver.create(most))
