"""What a snapshot says of itself: the format ``gms-snapshot/1``, as strict JSON. Pure data."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated

import msgspec

from gms_core.errors import ManifestError, SnapshotDamaged, SnapshotMismatch
from gms_core.layout import Allocation, Identity, check_allocations, layout_digest

FORMAT = "gms-snapshot/1"
PAGE_BYTES = 4096
"""What `O_DIRECT` asks for: every position, offset and size of a snapshot is a multiple of it."""
BLOCK_BYTES = 16 * 2**20
"""Bytes under one checksum; the last block of an image may be shorter."""

Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What offsets in files, and digests of layouts, can have."""

_HEX = re.compile(r"[0-9a-f]{16}")
_ROOT_ID = re.compile(r"[0-9a-f]{32}")


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of an image.

    Attributes:
        root: The ``root_id`` of the root in which it lies.
        path: Where, relative to the snapshot's folder in that root.
        size: Bytes.
    """

    root: str
    path: str
    size: Number


class Stripe(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of an image, and where it lies.

    Attributes:
        offset: Bytes from the image's begin.
        size: Bytes.
        shard: Index of the shard.
        position: Bytes from the shard's begin.
    """

    offset: Number
    size: Number
    shard: Number
    position: Number


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device that an image was saved from.

    Attributes:
        id: UUID, or ``host``.
        driver: ``cuda`` or ``host``.
        granularity: Bytes, of the memory driver.
    """

    id: str
    driver: str
    granularity: Number


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The committed layout of one pool of one device: its allocations side by side, in arena order and without gaps.

    Attributes:
        pool: The pool's name.
        generation: What it had there; a restored one gets its own.
        device: Where it was.
        identity: What the bytes are.
        digest: Of the layout, as `gms_core.layout.layout_digest` has it.
        allocations: Offset in the arena, and bytes, of each.
        tensors: The tensor manifest; base64 in JSON.
        shards: Its files.
        stripes: Where each part lies: in image order, without gaps and overlaps.
        block_bytes: Bytes under one checksum.
        checksums: xxh3_64 of each block, as 16 hexadecimal digits.
    """

    pool: str
    generation: Number
    device: Device
    identity: dict[str, str]
    digest: str
    allocations: tuple[tuple[Number, Number], ...]
    tensors: bytes
    shards: tuple[Shard, ...]
    stripes: tuple[Stripe, ...]
    block_bytes: Number
    checksums: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return sum(size for _, size in self.allocations)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot: one image, or one of each device of an engine.

    Attributes:
        format: `FORMAT`.
        name: The snapshot's name.
        version: Its number under that name.
        id: Random hexadecimal digits, which no other snapshot has.
        saved_at: When, as RFC 3339 in UTC.
        writer: The version of GMS.
        images: In the order of the devices.
    """

    format: str
    name: str
    version: Number
    id: str
    saved_at: str
    writer: str
    images: tuple[Image, ...]

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(image.size for image in self.images)


class _Format(msgspec.Struct, frozen=True):
    format: str


def encode(manifest: Manifest) -> bytes:
    """The manifest as JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(text: bytes, where: str) -> Manifest:
    """Read a manifest, and check all that can be checked without looking at the files.

    Args:
        text: JSON.
        where: The file that it comes from, for messages.

    Raises:
        SnapshotMismatch: It is of another version of the format.
        SnapshotDamaged: It is no manifest, or contradicts itself.
    """
    try:
        found = msgspec.json.decode(text, type=_Format).format
        if found != FORMAT:
            raise SnapshotMismatch(
                f"{where} is of the format {found!r}, not {FORMAT!r}", hint="Restore it with the version of GMS that has saved it."
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(f"{where} is not a manifest: {error}", hint="Verify the snapshot, and save it anew.") from error
    for image in manifest.images:
        if reason := _contradiction(image):
            raise SnapshotDamaged(f"{where}: the image of pool {image.pool!r}: {reason}", hint="Save the snapshot anew.")
    if not manifest.images:
        raise SnapshotDamaged(f"{where} names no image", hint="Save the snapshot anew.")
    return manifest


def check_relative(path: str) -> str:
    """Why a path is not one inside of a folder; empty if it is."""
    parts = PurePosixPath(path).parts
    if not parts or "\0" in path or path.startswith("/") or ".." in parts or str(PurePosixPath(path)) != path:
        return f"{path!r} is no plain path inside of the snapshot"
    return ""


def _contradiction(image: Image) -> str:
    """What is wrong with an image by itself; empty if nothing is."""
    if reason := _wrong_layout(image) or _wrong_shards(image):
        return reason
    end, ends = 0, [0] * len(image.shards)
    for stripe in image.stripes:
        if stripe.offset != end or stripe.size <= 0 or not 0 <= stripe.shard < len(image.shards) or stripe.position < 0:
            return f"the stripe at offset {stripe.offset} does not follow the one before, or lies in no shard"
        if any(number % PAGE_BYTES for number in (stripe.offset, stripe.size, stripe.position)):
            return f"the stripe at offset {stripe.offset} is not aligned to {PAGE_BYTES} bytes"
        end, ends[stripe.shard] = stripe.offset + stripe.size, max(ends[stripe.shard], stripe.position + stripe.size)
    if end != image.size:
        return f"its stripes have {end} bytes, its allocations {image.size}"
    if ends != [shard.size for shard in image.shards]:
        return "its stripes do not fill its shards"
    return _overlap(image) or _wrong_checksums(image)


def _wrong_layout(image: Image) -> str:
    allocations = tuple(Allocation(0, offset, size) for offset, size in image.allocations)
    try:
        check_allocations(allocations)
    except ManifestError as error:
        return str(error)
    if any(number % PAGE_BYTES for pair in image.allocations for number in pair):
        return f"its allocations are not aligned to {PAGE_BYTES} bytes"
    if layout_digest(Identity(image.identity), allocations, image.tensors) != image.digest:
        return "its identity, its allocations or its tensor manifest are not those that were saved"
    return ""


def _wrong_shards(image: Image) -> str:
    for shard in image.shards:
        if reason := check_relative(shard.path):
            return reason
        if _ROOT_ID.fullmatch(shard.root) is None:
            return f"{shard.root!r} names no root"
    places = [(shard.root, shard.path) for shard in image.shards]
    return "two of its shards are one file" if len(set(places)) < len(places) else ""


def _overlap(image: Image) -> str:
    in_files = sorted(image.stripes, key=lambda stripe: (stripe.shard, stripe.position))
    for before, after in pairwise(in_files):
        if before.shard == after.shard and after.position < before.position + before.size:
            return f"the stripes at offsets {before.offset} and {after.offset} lie in the same place"
    return ""


def _wrong_checksums(image: Image) -> str:
    if image.block_bytes <= 0 or image.block_bytes % PAGE_BYTES:
        return f"blocks of {image.block_bytes} bytes are not aligned to {PAGE_BYTES} bytes"
    if any(stripe.size % image.block_bytes for stripe in image.stripes[:-1]):
        return "a block lies in two stripes"
    count = -(-image.size // image.block_bytes)
    if len(image.checksums) != count or any(_HEX.fullmatch(checksum) is None for checksum in image.checksums):
        return f"it has {len(image.checksums)} checksums, not {count} of 16 hexadecimal digits"
    return ""
