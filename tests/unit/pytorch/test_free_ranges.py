"""The list of ranges that were given back."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gms_core.pytorch.cuda_pool import give_out, reclaim
from gms_core.pytorch.free_ranges import FreeRanges


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 12), st.sampled_from([1, 2, 4])), max_size=30))
def test_ranges_behave_like_a_set_of_bytes_when_they_are_added_and_taken(steps):
    ranges, model = FreeRanges(), set()
    for give_back, offset, size, alignment in steps:
        if give_back:
            ranges.add(offset, size)
            model |= set(range(offset, offset + size))
        else:
            taken = ranges.take(size, alignment)
            fits = [start for start in range(0, 80, alignment) if model >= set(range(start, start + size))]
            assert (taken is None) == (not fits)
            if taken is not None:
                assert taken in fits
                model -= set(range(taken, taken + size))
        assert ranges.total == len(model)


def test_whole_range_comes_back_when_its_parts_do():
    ranges = FreeRanges()
    for offset in (0, 20, 10):
        ranges.add(offset, 10)
    assert ranges.take(30, 1) == 0


def test_arena_backs_just_enough_when_parts_of_odd_sizes_are_given_out(memory):
    arena = memory.writable()
    arena.reserve_exact(100)
    arena.allocate(100)
    sizes = [1, 0, 5000, 512, 77]
    offsets = give_out(arena, sizes)
    reclaim(arena)
    assert [offset % 512 for offset in offsets] == [0] * 5
    used = sorted((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True) if size)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(used))
    assert used[0][0] >= 100
    assert arena.length - arena.used < memory.driver.granularity + 512
