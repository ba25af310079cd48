"""The manifest of a snapshot: what is written is read again, and nothing that contradicts itself is believed."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import InvalidArgument, SnapshotDamaged, SnapshotMismatch
from gms_core.layout import Allocation, Identity, layout_digest
from gms_core.snapshot.manifest import BLOCK_BYTES, FORMAT, PAGE_BYTES, Device, Image, Manifest, check_relative, decode, encode
from gms_core.snapshot.on_disk import Reference, reference
from gms_core.snapshot.plan import WeightedRoot, lay_out


@st.composite
def images(draw):
    end, allocations = 0, []
    for gap, pages in draw(st.lists(st.tuples(st.sampled_from([0, 0, 1, 7]), st.integers(1, 5000)), min_size=1, max_size=12)):
        allocations.append((end + gap * PAGE_BYTES, pages * PAGE_BYTES))
        end = sum(allocations[-1])
    size = sum(pages for _, pages in allocations)
    count = draw(st.integers(1, 3))
    where = [WeightedRoot(f"{number:032x}") for number in range(count)]
    shards, stripes = lay_out(size, "images/0", where, stripe_bytes=BLOCK_BYTES, shard_bytes=2 * BLOCK_BYTES)
    identity = draw(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), max_size=3))
    tensors = draw(st.binary(max_size=64))
    digest = layout_digest(Identity(identity), [Allocation(0, *pair) for pair in allocations], tensors)
    blocks = -(-size // BLOCK_BYTES)
    checksums = tuple(f"{draw(st.integers(0, 2**64 - 1)):016x}" for _ in range(blocks))
    device = Device("host", "host", PAGE_BYTES)
    return Image("weights", 3, device, identity, digest, tuple(allocations), tensors, shards, stripes, BLOCK_BYTES, checksums)


def manifest_of(*several: Image) -> Manifest:
    return Manifest(FORMAT, "model", 7, "0123456789abcdef", "2030-01-02T03:04:05Z", "0.1", several)


def changed(image, **fields):
    return encode(manifest_of(msgspec.structs.replace(image, **fields)))


@given(st.lists(images(), min_size=1, max_size=3))
def test_manifest_is_the_same_when_it_is_written_and_read(several):
    manifest = manifest_of(*several)
    assert decode(encode(manifest), "manifest.json") == manifest


@given(images(), st.data())
def test_manifest_is_refused_when_anything_of_the_layout_is_changed(image, data):
    shift = data.draw(st.sampled_from([PAGE_BYTES, 1, -PAGE_BYTES, 2**40]))
    index = data.draw(st.integers(0, len(image.stripes) - 1))
    stripe = image.stripes[index]
    field = data.draw(st.sampled_from(["offset", "size", "shard", "position"]))
    wrong = msgspec.structs.replace(stripe, **{field: getattr(stripe, field) + shift})
    cases = [
        changed(image, stripes=(*image.stripes[:index], wrong, *image.stripes[index + 1 :])),
        changed(image, stripes=(*image.stripes[:index], *image.stripes[index + 1 :])),
        changed(image, allocations=((image.allocations[0][0], image.allocations[0][1] + shift), *image.allocations[1:])),
        changed(image, allocations=image.allocations[1:]),
        changed(image, checksums=image.checksums[1:]),
        changed(image, checksums=("0" * 15, *image.checksums[1:])),
        changed(image, tensors=image.tensors + b"x"),
        changed(image, identity={**image.identity, "dtype": "other"}),
        changed(image, block_bytes=BLOCK_BYTES + PAGE_BYTES) if image.size > BLOCK_BYTES else b"",
        changed(image, shards=(msgspec.structs.replace(image.shards[0], size=image.shards[0].size + PAGE_BYTES), *image.shards[1:])),
        changed(image, shards=(msgspec.structs.replace(image.shards[0], path="images/../../other/1/images/0/00000.shard"), *image.shards[1:])),
        changed(image, shards=(msgspec.structs.replace(image.shards[0], root="here"), *image.shards[1:])),
    ]
    for text in cases:
        with pytest.raises(SnapshotDamaged, match=r"manifest\.json"):
            decode(text, "manifest.json")


@given(images(), st.data())
def test_manifest_is_refused_or_the_same_when_a_byte_of_it_is_lost(image, data):
    text = encode(manifest_of(image))
    at = data.draw(st.integers(0, len(text) - 1))
    # Any other error is a bug; what still makes sense is caught by the checksum of the whole.
    with contextlib.suppress(SnapshotDamaged, SnapshotMismatch):
        decode(text[:at] + text[at + 1 :], "manifest.json")


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b'{"format": "gms-snapshot/1"}', b"{" * 100_000])
def test_manifest_is_refused_when_it_is_none(text):
    with pytest.raises(SnapshotDamaged, match="not a manifest"):
        decode(text, "manifest.json")


def test_version_of_the_format_is_named_when_it_is_another_one():
    with pytest.raises(SnapshotMismatch, match="'gms-snapshot/2', not 'gms-snapshot/1'"):
        decode(b'{"format": "gms-snapshot/2", "unknown": []}', "manifest.json")


def test_manifest_is_refused_when_it_names_no_image():
    with pytest.raises(SnapshotDamaged, match="no image"):
        decode(encode(manifest_of()), "manifest.json")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "a/", "./a", "a\0b", "a/."])
def test_path_is_refused_when_it_is_not_one_inside_of_a_folder(path):
    assert check_relative(path)


def test_path_is_accepted_when_it_stays_inside():
    assert not check_relative("images/0/00000.shard")


@pytest.mark.parametrize(("text", "expected"), [("model", Reference("model")), ("a.b_c-1@12", Reference("a.b_c-1", 12))])
def test_reference_is_understood_when_it_is_one(text, expected):
    assert reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", ".hidden", "a/b", "a@", "a@0", "a@-1", "a@x", "a@1@2", "a" * 65, "a\n", "ä", "gms-root", "a@" + "9" * 30]
)
def test_reference_is_refused_when_it_is_none(text):
    with pytest.raises(InvalidArgument):
        reference(text)
