"""Host buffers of transfers: where they lie, how they are backed, and that they go away."""

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import TransferFailed
from gms_core.snapshot.buffers import HUGE_PAGE, MappedFile, Ring, populate
from tests.unit.snapshot_transfers import rings

PAGE = mmap.PAGESIZE


def _smaps(address):
    """What the kernel says of the mapping that an address lies in."""
    text, found = Path("/proc/self/smaps").read_text().splitlines(), {}
    inside = False
    for line in text:
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(word, 16) for word in name.split("-"))
            inside = begin <= address < end
        elif inside:
            found[name.rstrip(":")] = rest.split()
    return found


@given(st.integers(1, 9), st.integers(1, 1100).map(lambda pages: pages * PAGE))
def test_buffers_lie_in_whole_huge_pages_side_by_side_when_a_ring_is_made(count, size):
    ring = Ring(count, size)
    try:
        assert ring.address % HUGE_PAGE == ring.size % HUGE_PAGE == 0
        ends = [ring.address]
        for number, buffer in enumerate(ring.buffers):
            assert buffer.number == number
            assert len(buffer.view) >= size
            assert buffer.address >= ends[-1]
            assert buffer.address % (HUGE_PAGE if size >= HUGE_PAGE else PAGE) == 0
            ends.append(buffer.address + len(buffer.view))
        assert len(ring.buffers) == count
        assert ends[-1] <= ring.address + ring.size
    finally:
        ring.close()


def test_views_are_the_memory_at_their_addresses_when_written():
    ring = Ring(2, HUGE_PAGE)
    first, second = ring.buffers
    first.view[:3], second.view[-3:] = b"abc", b"xyz"
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(first.address)
        assert memory.read(3) == b"abc"
        memory.seek(second.address + HUGE_PAGE - 3)
        assert memory.read(3) == b"xyz"
    ring.close()


def test_kernel_is_asked_for_huge_pages_that_no_child_gets_when_a_ring_is_made():
    ring = Ring(2, HUGE_PAGE)
    flags = _smaps(ring.address)["VmFlags"]
    ring.close()
    assert {"hg", "dc"} <= set(flags)


def test_pages_are_there_when_buffers_are_populated():
    ring = Ring(2, HUGE_PAGE)
    populate(ring.buffers)
    resident = int(_smaps(ring.address)["Rss"][0])
    ring.close()
    assert resident * 1024 >= 2 * HUGE_PAGE


def test_pages_are_there_when_the_kernel_cannot_populate(monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.buffers._MADV_POPULATE_WRITE", 9999)
    ring = Ring(1, HUGE_PAGE)
    populate(ring.buffers)
    resident = int(_smaps(ring.address)["Rss"][0])
    ring.close()
    assert resident * 1024 >= HUGE_PAGE


def test_mapping_goes_away_when_a_ring_is_closed_twice():
    before = rings()
    ring = Ring(3, 5 * PAGE)
    assert ring.address in rings() - before
    ring.close()
    ring.close()
    assert rings() == before


def test_room_is_refused_in_words_when_the_machine_has_none():
    with pytest.raises(TransferFailed, match="no room for buffers") as caught:
        Ring(1, 2**47)
    assert "fewer threads" in caught.value.hint


def test_file_is_seen_in_place_when_it_is_in_memory(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(3 * PAGE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        mapped = MappedFile(file.fileno(), 3 * PAGE)
        assert mapped.populate(PAGE, 2 * PAGE)
        assert mapped.is_resident(PAGE, 2 * PAGE)
        assert bytes(mapped.part(PAGE, 2 * PAGE).view) == path.read_bytes()[PAGE:]
        mapped.close()
        mapped.close()


def test_nobody_gets_a_signal_when_a_mapped_file_is_cut(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(bytes(3 * PAGE))
    with path.open("r+b") as file:
        mapped = MappedFile(file.fileno(), 3 * PAGE)
        file.truncate(PAGE)
        assert not mapped.populate(PAGE, 2 * PAGE)
        mapped.close()
