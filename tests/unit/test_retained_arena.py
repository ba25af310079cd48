"""Addresses that have nothing, scratch, a front or a pool's memory beneath them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.client import RetainedArena
from gms_core.client.arena import Received, Take
from gms_core.client.scratch import MOST_ALIASES, scratch_layout
from gms_core.errors import DriverError, InvalidArgument, ProtocolError, SessionClosed
from gms_core.layout import Allocation
from gms_core.protocol.framing import close_descriptors
from gms_core.vmm.driver import Access, Address, Handle
from gms_core.vmm.host import HostDriver

PAGE = HostDriver.granularity


class FailingDriver(HostDriver):
    """The host driver, of which one call of `map` fails: the one before which no more are left."""

    maps_left = -1

    def map(self, address: Address, size: int, handle: Handle) -> None:
        self.maps_left -= 1
        if self.maps_left == -1:
            raise DriverError("no more mappings, says the test")
        super().map(address, size, handle)


class Pool:
    """A pool's memory, as the server would send it. Each allocation is filled with a byte of its own, its id."""

    def __init__(self, driver: HostDriver, sizes: Sequence[int], front: Sequence[int] = ()) -> None:
        offsets = list(itertools.accumulate(sizes, initial=0))
        self.allocations = [Allocation(number + 1, offsets[number], size) for number, size in enumerate(sizes)]
        self.spares = [Allocation(100 + number, offsets[number], sizes[number]) for number in front]
        self.handles = {one.id: self._filled(driver, one) for one in (*self.allocations, *self.spares)}
        self.driver = driver

    @staticmethod
    def _filled(driver: HostDriver, allocation: Allocation) -> Handle:
        handle, address = driver.create(allocation.size), driver.reserve(allocation.size)
        driver.map(address, allocation.size, handle)
        driver.set_access(address, allocation.size, Access.READ_WRITE)
        driver.write(address, bytes([allocation.id]) * allocation.size)
        driver.unmap(address, allocation.size)
        driver.free_reservation(address, allocation.size)
        return handle

    def receive(self, take: Take) -> None:
        for one in (*self.allocations, *self.spares):
            item = Received(one.id, one.size, self.driver.export(self.handles[one.id]))
            try:
                take([item])
            finally:
                close_descriptors([item.descriptor])


@pytest.fixture
def driver() -> Iterator[FailingDriver]:
    made = FailingDriver()
    yield made
    made.close()


@pytest.fixture
def arena(driver: FailingDriver) -> Iterator[RetainedArena]:
    made = RetainedArena(driver, 11 * PAGE)
    yield made
    made.close()


def adopted(driver: HostDriver, arena: RetainedArena, pages: Sequence[int], front: Sequence[int] = ()) -> Pool:
    pool = Pool(driver, [number * PAGE for number in pages], front)
    arena.adopt(pool.receive, pool.allocations, pool.spares)
    return pool


def content(driver: HostDriver, arena: RetainedArena) -> list[int]:
    """The first byte of each page."""
    return [driver.read(Address(arena.base + offset), 1)[0] for offset in range(0, arena.size, PAGE)]


def memory_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [target for target in found if "memfd" in target]


def test_pages_share_memory_when_scratch_is_mapped(driver, arena):
    assert arena.map_scratch(4 * PAGE) == 4 * PAGE + 3 * PAGE
    assert arena.backing == "scratch"
    driver.write(Address(arena.base + PAGE), b"\x07" * PAGE)
    assert content(driver, arena) == [0, 7, 0, 0, 0, 7, 0, 0, 0, 0, 0]
    driver.write(Address(arena.base + 3 * PAGE + PAGE // 2), b"\x01" * PAGE)
    assert driver.read(Address(arena.base + 8 * PAGE - 1), 1) == b"\x01"
    assert content(driver, arena)[8:] == [0, 0, 0]


def test_scratch_is_as_small_as_the_range_when_the_alias_is_larger(driver, arena):
    assert arena.map_scratch(2**40) == arena.size


def test_pool_is_there_at_the_same_addresses_when_it_is_mapped_in_the_place_of_scratch(driver, arena):
    base = arena.base
    arena.map_scratch(2 * PAGE)
    driver.write(arena.base, b"\xee" * arena.size)
    pool = adopted(driver, arena, [5, 5, 1])
    assert set(content(driver, arena)) == {0xEE}
    arena.map_pool()
    assert (arena.base, arena.backing) == (base, "pool")
    assert content(driver, arena) == [1] * 5 + [2] * 5 + [3]
    driver.write(Address(arena.base + 4 * PAGE), b"\x99" * 2 * PAGE)
    arena.unmap()
    again = RetainedArena(driver, arena.size)
    again.adopt(pool.receive, pool.allocations)
    again.map_pool()
    assert content(driver, again) == [1] * 4 + [0x99] * 2 + [2] * 4 + [3]
    again.close()


def test_memory_of_the_scratch_is_free_when_the_pool_is_mapped(driver, arena):
    before = len(memory_files())
    arena.map_scratch(2 * PAGE)
    arena.map_scratch(PAGE)
    assert len(memory_files()) == before + 1
    adopted(driver, arena, [11])
    with_pool = len(memory_files())
    arena.map_pool()
    assert len(memory_files()) == with_pool - 1


def test_nothing_changes_when_the_pool_is_mapped_twice(driver, arena):
    adopted(driver, arena, [11])
    arena.map_pool()
    driver.write(arena.base, b"\x05")
    driver.maps_left = 0
    arena.map_pool()
    assert driver.read(arena.base, 1) == b"\x05"


@pytest.mark.parametrize("maps", range(3))
def test_scratch_is_still_there_when_mapping_the_pool_fails(driver, arena, maps):
    arena.map_scratch(4 * PAGE)
    driver.write(arena.base, b"\x44" * arena.size)
    adopted(driver, arena, [4, 6, 1])
    driver.maps_left = maps
    with pytest.raises(DriverError) as raised:
        arena.map_pool()
    assert not getattr(raised.value, "__notes__", [])
    assert arena.backing == "scratch"
    assert set(content(driver, arena)) == {0x44}
    arena.map_pool()
    assert content(driver, arena) == [1] * 4 + [2] * 6 + [3]


@pytest.mark.parametrize("maps", range(3))
def test_no_memory_is_kept_when_mapping_scratch_fails(driver, arena, maps):
    before = len(memory_files())
    driver.maps_left = maps
    with pytest.raises(DriverError):
        arena.map_scratch(4 * PAGE)
    assert arena.backing == "none"
    assert len(memory_files()) == before


def test_nothing_is_left_when_the_arena_is_closed(driver):
    before = len(memory_files())
    arena = RetainedArena(driver, 6 * PAGE)
    pool = adopted(driver, arena, [4, 2], front=[1])
    arena.map_scratch(2 * PAGE)
    arena.map_pool()
    for handle in pool.handles.values():
        driver.release(handle)
    arena.close()
    arena.close()
    assert len(memory_files()) == before
    with pytest.raises(SessionClosed):
        arena.map_pool()


def test_contents_are_kept_when_the_pool_is_unmapped_and_mapped_again(driver, arena):
    adopted(driver, arena, [6, 5])
    arena.map_pool()
    driver.write(Address(arena.base + 6 * PAGE), b"\x63")
    arena.unmap()
    assert arena.backing == "none"
    with pytest.raises(DriverError, match="not all mapped"):
        driver.read(arena.base, 1)
    arena.map_scratch(PAGE)
    arena.map_pool()
    assert content(driver, arena) == [1] * 6 + [0x63] + [2] * 4


def test_same_memory_is_back_when_the_arena_is_remapped(driver, arena):
    arena.remap()
    assert arena.backing == "none"
    arena.map_scratch(2 * PAGE, cuts=[3 * PAGE])
    before = len(memory_files())
    arena.unmap()
    arena.unmap()
    assert len(memory_files()) == before - 2
    arena.remap()
    arena.remap()
    assert (arena.backing, len(memory_files())) == ("scratch", before)
    adopted(driver, arena, [3, 8], front=[0])
    for map_again, expected in ((arena.map_front, [100] * 3 + [0] * 8), (arena.map_pool, [100] * 3 + [2] * 8)):
        map_again(1)
        arena.unmap()
        arena.remap()
        assert content(driver, arena) == expected


def test_no_scratch_comes_back_when_it_had_gone_before_the_front_was_mapped(driver, arena):
    adopted(driver, arena, [3, 8], front=[0])
    arena.map_scratch(2 * PAGE, cuts=[3 * PAGE])
    arena.unmap()
    arena.map_front(1)
    before = len(memory_files())
    arena.unmap()
    arena.remap()
    assert (arena.backing, len(memory_files())) == ("front", before)
    with pytest.raises(DriverError, match="not all mapped"):
        driver.read(Address(arena.base + 3 * PAGE), 1)


@pytest.mark.parametrize("unmapped", [True, False])
@pytest.mark.parametrize("front", [True, False])
def test_nothing_maps_the_pool_when_it_was_disowned(driver, arena, unmapped, front):
    before = len(memory_files())
    pool = adopted(driver, arena, [3, 8], front=[0])
    arena.map_scratch(2 * PAGE, cuts=[3 * PAGE])
    arena.map_front(1) if front else arena.map_pool(1)
    if unmapped:
        arena.unmap()
    arena.disown()
    arena.disown()
    for handle in pool.handles.values():
        driver.release(handle)
    assert len(memory_files()) == before
    arena.remap()
    assert arena.backing == "none"
    with pytest.raises(InvalidArgument, match="adopt first"):
        arena.map_pool()
    adopted(driver, arena, [3, 8])
    arena.map_pool()
    assert content(driver, arena) == [1] * 3 + [2] * 8


def test_scratch_stays_when_the_pool_is_disowned(driver, arena):
    adopted(driver, arena, [11])
    arena.map_scratch(2 * PAGE)
    arena.disown()
    assert arena.backing == "scratch"
    arena.unmap()
    arena.disown()
    arena.remap()
    assert arena.backing == "scratch"


def test_remap_can_be_repeated_when_it_failed(driver, arena):
    adopted(driver, arena, [3, 8], front=[0])
    arena.map_scratch(8 * PAGE, cuts=[3 * PAGE])
    arena.map_front(1)
    arena.unmap()
    for maps in range(3):
        driver.maps_left = maps
        with pytest.raises(DriverError):
            arena.remap()
        assert arena.backing == "none"
    arena.remap()
    assert arena.backing == "front"
    assert content(driver, arena) == [100] * 3 + [0] * 8


def test_front_alone_is_mapped_when_the_rest_may_not_be(driver, arena):
    pool = adopted(driver, arena, [2, 4, 2, 3], front=[0, 2])
    arena.map_scratch(2 * PAGE, cuts=[2 * PAGE, 6 * PAGE, 8 * PAGE])
    driver.write(arena.base, b"\xaa" * arena.size)
    arena.map_front(1)
    arena.map_front(1)
    assert arena.backing == "front"
    assert content(driver, arena) == [100] * 2 + [0xAA] * 4 + [102] * 2 + [0xAA] * 3
    driver.write(arena.base, b"\x31")
    arena.map_pool(1)
    assert content(driver, arena) == [0x31, 100] + [2] * 4 + [102] * 2 + [4] * 3
    arena.unmap()
    arena.map_front(0)
    assert driver.read(Address(arena.base + 6 * PAGE), 1) == b"\x03"
    assert len(pool.spares) == 2


def test_front_is_refused_when_the_scratch_is_not_cut_at_its_border(driver, arena):
    adopted(driver, arena, [3, 8], front=[0])
    arena.map_scratch(2 * PAGE)
    with pytest.raises(InvalidArgument, match="across the border"):
        arena.map_front(0)
    arena.map_pool()
    with pytest.raises(InvalidArgument, match="mapped already"):
        arena.map_front(0)


def test_front_is_refused_when_the_pool_has_none(driver, arena):
    adopted(driver, arena, [11])
    with pytest.raises(InvalidArgument, match="no front"):
        arena.map_front(0)


def test_allocations_are_refused_when_they_do_not_fit(driver, arena):
    for allocations in ([Allocation(1, 0, 10 * PAGE)], [Allocation(1, PAGE, 11 * PAGE)], []):
        with pytest.raises(InvalidArgument):
            arena.adopt(lambda take: None, allocations)
    whole = [Allocation(1, 0, 11 * PAGE)]
    with pytest.raises(InvalidArgument, match="spare 2"):
        arena.adopt(lambda take: None, whole, [Allocation(2, 0, PAGE)])
    with pytest.raises(ProtocolError, match="did not send"):
        arena.adopt(lambda take: None, whole)
    with pytest.raises(InvalidArgument, match="no pool's memory"):
        arena.map_pool()


def test_nothing_is_adopted_when_the_server_sends_something_else(driver, arena):
    pool = Pool(driver, [4 * PAGE, 7 * PAGE])
    before = len(memory_files())
    with pytest.raises(ProtocolError, match="not one of this pool's"):
        arena.adopt(pool.receive, [pool.allocations[0], Allocation(9, 4 * PAGE, 7 * PAGE)])
    assert len(memory_files()) == before
    arena.adopt(pool.receive, pool.allocations)
    with pytest.raises(InvalidArgument, match="already"):
        arena.adopt(pool.receive, pool.allocations)


def test_size_is_rounded_up_when_it_is_no_multiple_of_the_granularity(driver):
    arena = RetainedArena(driver, PAGE + 1)
    assert arena.size == 2 * PAGE
    arena.close()
    with pytest.raises(InvalidArgument):
        RetainedArena(driver, 0)


@given(st.integers(1, 50_000), st.sampled_from([1, 4096, 2**21]), st.integers(1, 2**36), st.lists(st.integers(0, 50_000), max_size=6))
def test_layout_covers_the_range_when_sizes_are_any(units, granularity, alias_bytes, cut_units):
    size, cuts = units * granularity, [cut * granularity for cut in cut_units if cut <= units]
    pieces = scratch_layout(size, granularity, alias_bytes, cuts)
    assert [piece.offset for piece in pieces] == list(itertools.accumulate([piece.size for piece in pieces], initial=0))[:-1]
    assert sum(piece.size for piece in pieces) == size
    assert all(piece.size > 0 and piece.size % granularity == 0 for piece in pieces)
    assert {*cuts, size} - {0} <= {piece.offset + piece.size for piece in pieces}
    numbers = {piece.allocation: piece.size for piece in pieces}
    assert [numbers[piece.allocation] for piece in pieces] == [piece.size for piece in pieces]
    assert len(set(numbers.values())) == len(numbers)
    assert sorted(numbers) == list(range(len(numbers)))
    assert len(pieces) <= MOST_ALIASES + len(cuts)
    wanted = max(alias_bytes, -(-size // MOST_ALIASES)) + granularity
    assert max(numbers.values()) < wanted
    assert len(numbers) <= 2 + len(cuts)


@given(st.integers(-5, 5000), st.sampled_from([7, 4096]), st.integers(-1, 5), st.lists(st.integers(-1, 5000), max_size=2))
def test_layout_is_refused_when_a_number_is_out_of_range(size, granularity, alias_bytes, cuts):
    right = size > 0 and size % granularity == 0 and alias_bytes > 0 and all(0 <= cut <= size and cut % granularity == 0 for cut in cuts)
    if right:
        assert scratch_layout(size, granularity, alias_bytes, cuts)
    else:
        with pytest.raises(InvalidArgument):
            scratch_layout(size, granularity, alias_bytes, cuts)
