"""The contract of memory drivers, on memory files; and what only they can show."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("driver_contract")

from driver_contract import DriverContract, SealingContract  # noqa: E402 - after the line that makes its asserts talk
from driver_contract.harness import mapped, written  # noqa: E402

from gms_core.devices import HOST  # noqa: E402
from gms_core.errors import DeviceNotFound, DriverError  # noqa: E402
from gms_core.vmm import open_driver, open_physical_driver  # noqa: E402
from gms_core.vmm.driver import Access, Address, Descriptor  # noqa: E402
from gms_core.vmm.host import HostDriver  # noqa: E402
from gms_core.vmm.host_memory import Ledger  # noqa: E402

CAPACITY = 256 * HostDriver.granularity


class TestHostDriver(DriverContract, SealingContract):
    device = HOST
    raw_read = "print('touched' if len(ctypes.string_at(address, 1)) else '')"
    raw_write = "ctypes.memset(address, 1, 1); print('touched')"

    @pytest.fixture
    def driver(self) -> Iterator[HostDriver]:
        driver = HostDriver(CAPACITY)
        yield driver
        driver.close()

    def check_refused(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == -signal.SIGSEGV, (result.stdout, result.stderr)

    def test_import_is_refused_when_the_size_is_another(self, driver: HostDriver, size: int) -> None:
        descriptor = driver.export(driver.create(size))
        with pytest.raises(DriverError, match=f"{size} bytes, not to {2 * size}"):
            driver.import_descriptor(descriptor, 2 * size)
        os.close(descriptor)

    def test_import_is_refused_when_another_process_could_still_cut_the_file(self, driver: HostDriver, size: int) -> None:
        descriptor = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        with pytest.raises(DriverError, match="not sealed"):
            driver.import_descriptor(Descriptor(descriptor), size)
        os.close(descriptor)

    def test_reservation_and_memory_stay_when_the_kernel_refuses_a_mapping(self, driver: HostDriver, size: int, monkeypatch) -> None:
        handle = written(driver, size, b"whole")
        address = driver.reserve(size)
        unmapped = HostDriver._bind

        def refuse(*_: object) -> None:
            driver._vacate(address, size)
            raise DriverError("mmap failed: ENOMEM (Cannot allocate memory)")

        monkeypatch.setattr(HostDriver, "_bind", staticmethod(refuse))
        with pytest.raises(DriverError, match="ENOMEM"):
            driver.map(address, size, handle)
        monkeypatch.setattr(HostDriver, "_bind", staticmethod(unmapped))
        driver.map(address, size, handle)
        driver.set_access(address, size, Access.READ)
        assert driver.read(address, 5) == b"whole"
        driver.unmap(address, size)
        driver.free_reservation(address, size)

    def test_access_of_all_stays_when_the_kernel_refuses_one_change(self, driver: HostDriver, size: int, monkeypatch) -> None:
        address = driver.reserve(2 * size)
        for place in range(2):
            driver.map(Address(address + place * size), size, driver.create(size))
        driver.set_access(address, 2 * size, Access.READ_WRITE)
        protect, failed = HostDriver._protect, []

        def refuse_once(mapping, access) -> None:
            if mapping.address != address and not failed:
                failed.append(mapping)
                raise DriverError("mprotect failed: ENOMEM (Cannot allocate memory)")
            protect(mapping, access)

        monkeypatch.setattr(HostDriver, "_protect", staticmethod(refuse_once))
        with pytest.raises(DriverError, match="ENOMEM"):
            driver.set_access(address, 2 * size, Access.READ)
        driver.write(address, b"both writable")
        driver.write(Address(address + size), b"both writable")
        driver.unmap(address, 2 * size)
        driver.free_reservation(address, 2 * size)

    def test_error_says_call_result_and_sizes_when_addresses_run_out(self) -> None:
        body = """
import resource
from gms_core.errors import DriverError
from gms_core.vmm.host import HostDriver
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
try:
    HostDriver().reserve(2**33)
except DriverError as error:
    print(error)
"""
        result = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
        assert result.stdout.startswith("mmap failed: ENOMEM (Cannot allocate memory); 8589934592 bytes")
        assert "ulimit -v" in result.stdout

    def test_memory_goes_nowhere_when_there_is_no_descriptor_left_for_it(self) -> None:
        body = """
import os, resource
from gms_core.errors import DriverError
from gms_core.vmm.host import HostDriver
driver = HostDriver(2**24)
driver.release(driver.create(4096))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    driver.create(4096)
except DriverError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
"""
        result = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
        assert "EMFILE" in result.stdout, result.stderr
        assert "ulimit -n" in result.stdout

    def test_mapping_stays_readable_when_the_driver_is_closed(self, driver: HostDriver, size: int) -> None:
        handle = written(driver, size, b"leaked, not lost")
        with mapped(driver, handle, size, Access.READ) as address:
            driver.close()
            assert driver.read(address, 16) == b"leaked, not lost"


def test_server_half_and_whole_driver_are_of_one_kind_when_the_host_is_opened() -> None:
    for driver in (open_driver(HOST), open_physical_driver(HOST, 2**20)):
        assert driver.name == "host"
        driver.close()


def test_total_is_the_capacity_when_one_is_given() -> None:
    driver = open_physical_driver(HOST, CAPACITY)
    assert driver.memory_info() == (CAPACITY, CAPACITY)
    driver.close()


@pytest.mark.parametrize("name", ["", "0", "cuda:0", "gpu-1"])
def test_device_is_refused_when_its_name_is_no_uuid(name: str) -> None:
    with pytest.raises(DeviceNotFound, match="UUID"):
        open_driver(name)


def test_memory_is_free_again_when_more_files_go_than_the_kernel_tells_of() -> None:
    ledger = Ledger()
    kept = os.memfd_create("kept")
    ledger.add(kept, 7)
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 2 + 1):
        gone = os.memfd_create("gone")
        ledger.add(gone, 1)
        os.close(gone)
    assert ledger.used == 7
    os.close(kept)
    assert ledger.used == 0
    ledger.close()
