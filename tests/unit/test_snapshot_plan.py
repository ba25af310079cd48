"""Where bytes of an image lie: every byte in one place, and each root gets its share."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import InvalidArgument
from gms_core.snapshot.manifest import BLOCK_BYTES, PAGE_BYTES
from gms_core.snapshot.plan import WeightedRoot, lay_out, pieces

sizes = st.integers(0, 3 * 2**30 // PAGE_BYTES).map(lambda pages: pages * PAGE_BYTES)
places = st.lists(st.floats(0.1, 10), min_size=1, max_size=5).map(
    lambda weights: [WeightedRoot(f"{number:032x}", weight) for number, weight in enumerate(weights)]
)
stripes_of = st.integers(1, 8).map(lambda blocks: blocks * BLOCK_BYTES)


@given(sizes, places, stripes_of, st.integers(1, 6))
def test_every_byte_has_one_place_when_an_image_is_laid_out(size, where, stripe_bytes, stripes_a_shard):
    shards, stripes = lay_out(size, "images/0", where, stripe_bytes=stripe_bytes, shard_bytes=stripes_a_shard * stripe_bytes)
    assert sum(stripe.size for stripe in stripes) == sum(shard.size for shard in shards) == size
    ends = [0] * len(shards)
    end = 0
    for stripe in stripes:
        assert (stripe.offset, stripe.position) == (end, ends[stripe.shard])
        end, ends[stripe.shard] = end + stripe.size, ends[stripe.shard] + stripe.size
    assert ends == [shard.size for shard in shards]
    assert all(0 < shard.size <= stripes_a_shard * stripe_bytes for shard in shards)
    assert len({(shard.root, shard.path) for shard in shards}) == len(shards)


@given(sizes, places, stripes_of)
def test_each_root_has_its_share_at_any_point_when_weights_differ(size, where, stripe_bytes):
    shards, stripes = lay_out(size, "images/0", where, stripe_bytes=stripe_bytes, shard_bytes=64 * stripe_bytes)
    total = sum(place.weight for place in where)
    counts = dict.fromkeys((place.root for place in where), 0)
    for done, stripe in enumerate(stripes, 1):
        counts[shards[stripe.shard].root] += 1
        for place in where:
            assert abs(counts[place.root] - done * place.weight / total) < len(where)


@given(sizes, places, stripes_of)
def test_blocks_follow_one_another_when_stripes_are_cut(size, where, stripe_bytes):
    shards, stripes = lay_out(size, "images/0", where, stripe_bytes=stripe_bytes, shard_bytes=4 * stripe_bytes)
    work = list(pieces(stripes))
    assert [piece.block for piece in work] == list(range(-(-size // BLOCK_BYTES)))
    assert all(after.offset == before.offset + before.size for before, after in pairwise(work))
    assert sum(piece.size for piece in work) == size
    assert all(piece.position + piece.size <= shards[piece.shard].size for piece in work)


@pytest.mark.parametrize(
    ("where", "sizes"),
    [
        ([], (BLOCK_BYTES, BLOCK_BYTES)),
        ([WeightedRoot("a", 0.0)], (BLOCK_BYTES, BLOCK_BYTES)),
        ([WeightedRoot("a")], (BLOCK_BYTES + 1, BLOCK_BYTES + 1)),
        ([WeightedRoot("a")], (2 * BLOCK_BYTES, 3 * BLOCK_BYTES)),
        ([WeightedRoot("a")], (0, BLOCK_BYTES)),
    ],
)
def test_layout_is_refused_when_roots_or_sizes_are_wrong(where, sizes):
    with pytest.raises(InvalidArgument):
        lay_out(BLOCK_BYTES, "images/0", where, stripe_bytes=sizes[0], shard_bytes=sizes[1])
