"""What the tests of the contract share: a child process with a driver, and memory with its mapping or descriptor."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import ClassVar

import pytest

from gms_core.devices import DeviceId
from gms_core.vmm.driver import Access, Address, Descriptor, Driver, Handle

PRELUDE = """
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from gms_core.errors import DriverError
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Access, Address, Descriptor
driver = open_driver(sys.argv[1])
size, descriptor = int(sys.argv[2]), int(sys.argv[3])

def imported(access):
    handle = driver.import_descriptor(descriptor, size)
    address = driver.reserve(size)
    driver.map(address, size, handle)
    if access is not None:
        driver.set_access(address, size, access)
    return address
"""


def open_descriptors() -> set[tuple[str, str]]:
    """Number and target of each open descriptor, without the one that lists them."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@contextlib.contextmanager
def mapped(driver: Driver, handle: Handle, size: int, access: Access = Access.READ_WRITE) -> Iterator[Address]:
    """A reservation of its own with one mapping in it."""
    address = driver.reserve(size)
    driver.map(address, size, handle)
    driver.set_access(address, size, access)
    yield address
    driver.unmap(address, size)
    driver.free_reservation(address, size)


@contextlib.contextmanager
def exported(driver: Driver, handle: Handle) -> Iterator[Descriptor]:
    """A descriptor that is closed at the end."""
    descriptor = driver.export(handle)
    yield descriptor
    os.close(descriptor)


def written(driver: Driver, size: int, data: bytes) -> Handle:
    """New memory that starts with ``data``."""
    handle = driver.create(size)
    with mapped(driver, handle, size) as address:
        driver.write(address, data)
    return handle


class DriverTests:
    """Base of the tests. A class that derives from it gives a fixture ``driver`` and the attributes.

    Attributes:
        device: The device that a child process opens, too.
        raw_read: Code that reads one byte at ``address`` without asking the driver's bookkeeping, and prints ``touched`` if it could.
        raw_write: The same for writing.
    """

    device: ClassVar[DeviceId]
    raw_read: ClassVar[str]
    raw_write: ClassVar[str]

    @pytest.fixture(autouse=True)
    def no_descriptor_left(self) -> Iterator[None]:
        """Fail a test that leaves a descriptor open, device files apart: CUDA opens and keeps those as it likes."""
        before = open_descriptors()
        yield
        left = {(number, target) for number, target in open_descriptors() - before if not target.startswith("/dev/nvidia")}
        assert not left, "descriptors left open"

    @pytest.fixture
    def size(self, driver: Driver) -> int:
        return 2 * driver.granularity

    def in_child(self, body: str, size: int, descriptor: int = -1) -> subprocess.CompletedProcess[str]:
        """Run code in a new process that has opened the same device, and inherits one descriptor."""
        command = [sys.executable, "-c", PRELUDE + body, self.device, str(size), str(descriptor)]
        passed = (descriptor,) if descriptor >= 0 else ()
        return subprocess.run(command, pass_fds=passed, capture_output=True, text=True)

    def check_refused(self, result: subprocess.CompletedProcess[str]) -> None:
        """Check how a process ended that touched memory without the right to."""
        raise AssertionError("each driver says it")
