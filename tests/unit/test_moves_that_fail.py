"""Moves of a reader to another generation, of which a step fails or is interrupted: what it reads is always what its lease says."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from gms_core.client import ReadLease, Session, arena, lease
from gms_core.errors import DriverError
from gms_core.vmm.host import HostDriver
from tests.conftest import RunningServer
from tests.unit.publishing import MODEL, PAGE, generations, publish, read_all, until


class FaultyDriver(HostDriver):
    """Real memory, of which some calls fail.

    Attributes:
        faults: Of each call, which of the next ones fail, counted from 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, set[int]] = {}

    def _fail_if_told(self, call: str) -> None:
        due = self.faults.get(call, set())
        self.faults[call] = {number - 1 for number in due if number}
        if 0 in due:
            raise DriverError(f"{call} failed because the test wants it")

    def release(self, handle: Any) -> None:
        self._fail_if_told("release")
        super().release(handle)

    def import_descriptor(self, descriptor: Any, size: int) -> Any:
        self._fail_if_told("import")
        return super().import_descriptor(descriptor, size)

    def unmap(self, address: Any, size: int) -> None:
        self._fail_if_told("unmap")
        super().unmap(address, size)

    def map(self, address: Any, size: int, handle: Any) -> None:
        self._fail_if_told("map")
        super().map(address, size, handle)

    def set_access(self, address: Any, size: int, access: Any) -> None:
        self._fail_if_told("set_access")
        super().set_access(address, size, access)


@pytest.fixture
def faulty(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Session, ReadLease, FaultyDriver]]:
    """A reader of three slabs of generation 1, where generation 2 is committed, and its driver."""
    driver = FaultyDriver()
    with contextlib.ExitStack() as stack:
        trainer = stack.enter_context(server.connect())
        publish(trainer, b"first" * PAGE, slab=2 * PAGE).release()
        monkeypatch.setattr("gms_core.client.session.open_driver", lambda _: driver)
        reader = stack.enter_context(server.connect())
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        assert isinstance(lease, ReadLease)
        lease.map()
        publish(trainer, b"other" * PAGE, slab=2 * PAGE).release()
        yield reader, lease, driver
        driver.faults.clear()
        lease.release()
        until(lambda: reader.status().allocated_bytes == 5 * PAGE)
        driver.close()


@pytest.mark.parametrize("fault", [("import", 0), ("import", 2), ("unmap", 0), ("unmap", 1), ("map", 0), ("map", 2), ("set_access", 0)])
def test_old_memory_is_mapped_as_before_when_the_driver_fails(faulty: Any, fault: tuple[str, int]) -> None:
    reader, lease, driver = faulty
    name, number = fault
    driver.faults[name] = {number}
    with pytest.raises(DriverError, match="because the test wants it"):
        lease.move()
    assert lease.layout.generation == 1
    assert read_all(reader, lease, 5 * PAGE) == b"first" * PAGE
    assert generations(reader) == [(1, False, False, 1), (2, True, False, 0)]
    assert lease.move()
    assert read_all(reader, lease, 5 * PAGE) == b"other" * PAGE


def test_reader_is_told_that_nothing_is_mapped_when_the_old_memory_cannot_be_put_back(faulty: Any) -> None:
    reader, lease, driver = faulty
    driver.faults["map"] = {1, 2}  # the second of the new memory, then the first of the old
    with pytest.raises(DriverError, match="remap tries that again"):
        lease.move()
    assert lease.layout.generation == 1
    assert not lease.arena.mapped
    lease.remap()
    assert reader.driver.read(lease.arena.base, 5 * PAGE) == b"first" * PAGE
    assert lease.move()
    assert read_all(reader, lease, 5 * PAGE) == b"other" * PAGE


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lease_is_that_of_the_new_generation_when_a_handle_of_the_old_one_cannot_be_given_up(faulty: Any, number: int) -> None:
    reader, lease, driver = faulty
    driver.faults["release"] = {number}
    assert lease.move()
    assert lease.layout.generation == 2
    assert read_all(reader, lease, 5 * PAGE) == b"other" * PAGE
    assert generations(reader) == [(2, True, False, 1)]


def test_reader_comes_back_when_new_memory_could_not_be_unmapped_either(faulty: Any) -> None:
    """The second of the new slabs cannot be mapped, and then the first of them not be unmapped, once or twice."""
    reader, lease, driver = faulty
    for failures in ({3}, {3, 4, 5, 6}):
        driver.faults.update(map={1}, unmap=set(failures))
        with pytest.raises(DriverError, match="remap tries that again"):
            lease.move()
        assert (lease.layout.generation, lease.arena.mapped) == (1, False)
        driver.faults.clear()
        lease.remap()
        assert reader.driver.read(lease.arena.base, 5 * PAGE) == b"first" * PAGE
    assert lease.move()
    assert read_all(reader, lease, 5 * PAGE) == b"other" * PAGE


def test_lease_is_kept_when_its_memory_cannot_be_unmapped_after_a_move_that_failed(faulty: Any) -> None:
    _, lease, driver = faulty
    driver.faults.update(map={1}, unmap={3, 4, 5, 6, 7})
    with pytest.raises(DriverError, match="remap tries that again"):
        lease.move()
    driver.faults["unmap"] = {0}
    with pytest.raises(DriverError, match="unmap failed"):
        lease.release()
    assert generations(faulty[0]) == [(1, False, False, 1), (2, True, False, 0)]


class Interrupt:
    """Interrupts this thread, as Ctrl-C does, before one of the lines of an arena or a lease; which one is counted from 0."""

    FILES = (arena.__file__, lease.__file__)

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        sys.settrace(self)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def test_reader_has_one_generation_whole_when_it_is_interrupted_anywhere(server: RunningServer) -> None:
    with server.connect() as trainer, server.connect() as reader:
        contents = {1: b"v0001" * PAGE}
        publish(trainer, contents[1], slab=2 * PAGE).release()
        lease = reader.acquire("weights", "ro", MODEL, timeout_s=1)
        lease.map()
        line, interrupted = 0, True
        while interrupted:
            number = len(contents) + 1
            contents[number] = f"v{number:04}".encode() * PAGE
            publish(trainer, contents[number], slab=2 * PAGE).release()
            interrupted = False
            try:
                with Interrupt(line):
                    lease.move()
            except KeyboardInterrupt:
                interrupted = True
            assert lease.arena.mapped
            assert read_all(reader, lease, 5 * PAGE) == contents[lease.layout.generation], f"interrupted before line {line}"
            line += 1
        assert line > 30
        assert generations(trainer) == [(max(contents), True, False, 1)]
        assert trainer.status().allocated_bytes == 5 * PAGE
        lease.release()
        reader.driver.close()  # an interrupt may leave a handle
