"""Where the first blocks of a KV cache lie, for whatever layout: every byte of them, and memory that is cut at the borders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gms_core.kv.bridge import blocks_of, most_bytes, wanted_bytes
from gms_core.kv.front import Range, View, borders, covers, cut, front_of, merged
from gms_core.pytorch.kv import views_of

GRANULE = 64


def view(tensor: torch.Tensor) -> View:
    return views_of([tensor], tensor.untyped_storage().data_ptr())[0]


def touched(size: int, tensor: torch.Tensor, chosen: torch.Tensor) -> list[bool]:
    """Which bytes of a storage a part of a tensor over it uses."""
    tensor.fill_(0)
    chosen.fill_(1)
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return [bool(byte) for byte in storage[:size]]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, list[int], list[int]]:
    """Blocks, block dimension, shape as a kernel sees it, and in which order its dimensions lie in memory."""
    blocks = draw(st.sampled_from([5, 7, 11, 13]))
    others = draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4))
    place = draw(st.integers(0, len(others)))
    shape = [*others[:place], blocks, *others[place:]]
    order = draw(st.permutations(range(len(shape))))
    return blocks, place, shape, list(order)


@given(layouts(), st.integers(1, 13), st.sampled_from([torch.uint8, torch.float16, torch.float32]))
def test_every_byte_of_the_first_blocks_is_in_the_front_when_the_layout_is_any(
    layout: tuple[int, int, list[int], list[int]], wanted: int, dtype: torch.dtype
) -> None:
    blocks, place, shape, order = layout
    wanted = min(wanted, blocks)
    lying = torch.zeros([shape[number] for number in order], dtype=dtype)
    tensor = lying.permute([order.index(number) for number in range(len(shape))])
    assert list(tensor.shape) == shape
    size = lying.numel() * lying.element_size()
    front = front_of([view(tensor)], blocks, wanted, GRANULE)
    used = touched(size, lying, tensor.narrow(place, 0, wanted).view(tensor.narrow(place, 0, wanted).shape))
    assert front, "a layout that is dense can be told"
    for offset in (offset for offset, one in enumerate(used) if one):
        assert any(start <= offset < end for start, end in front)
    assert all(start % GRANULE == end % GRANULE == 0 for start, end in front)
    assert all(one.end < other.start for one, other in itertools.pairwise(front))
    whole = front_of([view(tensor)], blocks, blocks, GRANULE)
    assert whole == [Range(0, -(-size // GRANULE) * GRANULE)]


def test_halves_of_keys_and_values_are_two_ranges_of_the_front() -> None:
    lying = torch.zeros(2, 100, 16, 8, dtype=torch.float32)
    half = 100 * 16 * 8 * 4
    assert front_of([view(lying)], 100, 10, 512) == [Range(0, 10 * 512), Range(half, half + 10 * 512)]


def test_layers_of_one_buffer_whose_blocks_are_outermost_are_one_range() -> None:
    buffer = torch.zeros(50, 3, 64, dtype=torch.uint8)
    layers = [buffer[:, layer] for layer in range(3)]
    assert front_of([view(layer) for layer in layers], 50, 5, 64) == [Range(0, 5 * 3 * 64)]


def test_blocks_that_a_kernel_cuts_into_parts_are_found() -> None:
    assert front_of([view(torch.zeros(400, 16, dtype=torch.uint8))], 100, 10, 16) == [Range(0, 10 * 4 * 16)]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(100, 100, dtype=torch.uint8),
        torch.zeros(7, 16, dtype=torch.uint8),
        torch.zeros(200, 300, dtype=torch.uint8),
        torch.zeros(100, 16, dtype=torch.uint8).as_strided((100, 16), (8, 1)),
        torch.zeros(1, 100, dtype=torch.uint8).expand(100, 100)[:, :5],
        torch.zeros(100 * 64, dtype=torch.uint8),
        torch.zeros(400, 100, 8, dtype=torch.uint8),
    ],
    ids=[
        "two dimensions could be blocks",
        "none could",
        "two could be parts of blocks",
        "blocks overlap",
        "all blocks are one",
        "raw bytes",
        "parts of blocks, or tokens",
    ],
)
def test_there_is_no_front_when_it_cannot_be_told_where_blocks_lie(tensor: torch.Tensor) -> None:
    assert front_of([view(torch.zeros(100, 16)), view(tensor)], 100, 10, 16) == []


def test_parts_are_covered_when_each_lies_in_one_range() -> None:
    ranges = [Range(0, 10), Range(20, 30)]
    assert covers(ranges, [Range(0, 10), Range(25, 26)])
    assert covers(ranges, [])
    assert not covers(ranges, [Range(5, 25)])
    assert not covers(ranges, [Range(0, 10), Range(30, 31)])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=12))
def test_merged_ranges_are_the_same_bytes(pieces: list[tuple[int, int]]) -> None:
    ranges = [Range(start, start + size) for start, size in pieces]
    found = merged(ranges)
    assert {byte for one in found for byte in range(*one)} == {byte for one in ranges for byte in range(*one)}
    assert all(one.end < other.start for one, other in itertools.pairwise(found))


@given(st.integers(1, 200), st.integers(1, 40), st.lists(st.tuples(st.integers(0, 199), st.integers(1, 60)), max_size=6))
def test_memory_is_cut_at_the_borders_of_the_front_and_nowhere_else_than_needed(size: int, slab: int, pieces: Sequence[tuple[int, int]]) -> None:
    front = merged(Range(start, min(size, start + length)) for start, length in pieces if start < size)
    sizes, chosen = cut(size, slab, front)
    assert sum(sizes) == size
    assert all(0 < one <= slab for one in sizes)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    assert merged(Range(starts[number], starts[number] + sizes[number]) for number in chosen) == merged(front)
    spans = sum(math.ceil((end - start) / slab) for start, end in front)
    assert len(chosen) == spans
    assert set(borders(front)) <= {*starts, size}


@pytest.mark.parametrize(
    ("said", "size", "wanted"), [(None, 2**40, 2**30), (None, 2**34, 2**30), (None, 2**26, 2**22), (0, 2**40, 0), (5, 2**40, 5), (None, 0, 0)]
)
def test_bridge_is_as_large_as_the_user_says_or_a_part_of_a_small_memory(said: int | None, size: int, wanted: int) -> None:
    assert wanted_bytes(said, size) == wanted
    assert most_bytes(said, size) == wanted * 3 // 2


@pytest.mark.parametrize(
    ("wanted", "size", "num_blocks", "blocks"),
    [(0, 1000, 100, 0), (100, 1000, 100, 10), (501, 1000, 100, 50), (510, 1000, 100, 0), (9, 1000, 100, 0), (20, 1000, 100, 2), (5, 0, 1, 0)],
)
def test_bridge_has_the_blocks_that_fit_or_none_when_that_is_not_worth_while(wanted: int, size: int, num_blocks: int, blocks: int) -> None:
    assert blocks_of(wanted, size, num_blocks) == blocks
