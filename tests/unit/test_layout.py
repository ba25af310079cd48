"""Identities are compared by what decides, and digests do not depend on the server's numbers."""

import pytest

from gms_core.errors import ManifestError
from gms_core.layout import Allocation, Identity, check_allocations, layout_digest


def test_place_is_ignored_when_both_contents_are_known():
    expected = Identity({"content": "x", "model": "/a", "revision": "1", "dtype": "bf16"})
    assert expected.differences(Identity({"content": "x", "model": "/b", "revision": "2", "dtype": "bf16"})) == {}


def test_place_is_compared_when_a_content_is_unknown():
    expected = Identity({"content": "", "model": "/a", "dtype": "bf16"})
    assert expected.differences(Identity({"content": "x", "model": "/b", "dtype": "bf16"})) == {"model": "'/a' != '/b'"}


def test_every_differing_field_is_named_when_identities_differ():
    expected = Identity({"content": "x", "dtype": "bf16", "tp_size": "2"})
    published = Identity({"content": "y", "dtype": "fp16", "extra": "1"})
    assert set(expected.differences(published)) == {"content", "dtype", "tp_size", "extra"}


def test_digest_is_equal_when_only_ids_differ():
    identity = Identity({"a": "1"})
    assert layout_digest(identity, [Allocation(1, 0, 8)], b"m") == layout_digest(identity, [Allocation(9, 0, 8)], b"m")
    assert layout_digest(identity, [Allocation(1, 0, 8)], b"m") != layout_digest(identity, [Allocation(1, 0, 16)], b"m")


@pytest.mark.parametrize(
    "allocations", [[Allocation(1, 0, 8), Allocation(2, 4, 8)], [Allocation(1, 8, 8), Allocation(2, 0, 8)], [Allocation(1, 0, 0)]]
)
def test_allocations_are_refused_when_they_overlap_or_are_out_of_order(allocations):
    with pytest.raises(ManifestError):
        check_allocations(allocations)
