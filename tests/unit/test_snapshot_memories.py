"""Memory of transfers: where an image's parts lie in an arena, and waits for an arena that comes late or never."""

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import DeviceNotFound, DriverUnavailable, InvalidArgument, TransferCancelled
from gms_core.snapshot.memories import Arrival, DiscardingMemory, memory_for
from gms_core.snapshot.plan import Extents
from tests.unit.snapshot_transfers import GAPS, Memory

PAGE = 4096
NO_GPU = "GPU-00000000-0000-0000-0000-000000000000"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=8), st.data())
def test_every_part_has_its_places_when_allocations_have_gaps(gaps_and_sizes, data):
    place, allocations, places = 0, [], []
    for gap, size in gaps_and_sizes:
        place += gap
        allocations.append((place, size))
        places += range(place, place + size)
        place += size
    offset = data.draw(st.integers(0, len(places)))
    size = data.draw(st.integers(0, len(places) - offset))
    found = list(Extents(allocations).ranges(offset, size))
    assert [place + step for place, _, length in found for step in range(length)] == places[offset : offset + size]
    assert [inside + step for _, inside, length in found for step in range(length)] == list(range(size))
    assert all(after[0] != before[0] + before[2] for before, after in pairwise(found)), "what lies side by side is one copy"


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (37 * PAGE, 1), (36 * PAGE, 2 * PAGE)])
def test_part_is_refused_when_the_image_does_not_have_it(offset, size):
    with pytest.raises(InvalidArgument, match="not within the"):
        list(Extents(GAPS).ranges(offset, size))


def test_copies_go_to_where_allocations_lie_when_they_have_gaps():
    source, target = Memory(64 * PAGE), Memory(80 * PAGE)
    source.bytes[: 37 * PAGE] = b"".join(bytes([number]) * PAGE for number in range(1, 38))
    with memory_for("host", GAPS) as memory:
        memory.ready(target.base)
        lane = memory.lane()
        lane.wait(lane.to_memory(0, source.base, 37 * PAGE))
        lane.wait(lane.from_memory(source.base + 40 * PAGE, 7 * PAGE, 3 * PAGE))
        lane.close()
    assert [target.bytes[page * PAGE] for page in (0, 7, 8, 10, 11, 12, 39, 40, 67, 68)] == [1, 8, 0, 0, 9, 0, 0, 10, 37, 0]
    assert [source.bytes[page * PAGE] for page in (40, 41, 42, 43)] == [8, 9, 10, 0]


@pytest.mark.parametrize("end", ["never", "abandon", "exit"])
def test_lane_gives_up_when_its_memory_does_not_come(end):
    told = []

    def wait(lane):
        with pytest.raises(TransferCancelled):
            lane.arrive()
        told.append(threading.current_thread())

    with memory_for("host", GAPS) as memory:
        lane = memory.lane()
        thread = threading.Thread(target=wait, args=(lane,))
        thread.start()
        {"never": memory.never, "abandon": lane.abandon, "exit": lambda: None}[end]()
    thread.join(30)
    assert told == [thread]


def test_other_lanes_go_on_when_one_was_abandoned():
    with memory_for("host", GAPS) as memory:
        given_up, other = memory.lane(), memory.lane()
        given_up.abandon()
        memory.ready(Memory(PAGE).base)
        other.arrive()
        with pytest.raises(TransferCancelled):
            given_up.arrive()


def test_memory_stays_there_when_it_is_called_off_too_late():
    arrival = Arrival()
    arrival.ready(4096)
    arrival.never()
    assert arrival.waiter().base() == 4096


def test_memory_that_keeps_nothing_gives_nothing_when_asked():
    with DiscardingMemory() as memory:
        lane = memory.lane()
        lane.arrive()
        lane.wait(lane.to_memory(0, 0, 4096))
        with pytest.raises(InvalidArgument, match="keeps nothing"):
            lane.from_memory(4096, 0, 4096)


def test_device_is_named_or_what_is_missing_when_there_is_no_such_gpu():
    with pytest.raises((DeviceNotFound, DriverUnavailable)):
        memory_for(NO_GPU, GAPS)
