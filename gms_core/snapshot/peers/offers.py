"""What a machine that serves its published memory tells those that pull it: a manifest as a snapshot has it, and where the bytes are. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import msgspec

from gms_core.errors import SnapshotDamaged, SnapshotMismatch
from gms_core.snapshot.manifest import Manifest, decode
from gms_core.snapshot.matching import check_alike

FORMAT = "gms-peer/1"


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A contiguous range of addresses of the peer.

    Attributes:
        begin: The first.
        size: Bytes.
    """

    begin: int
    size: int


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an image lies in the peer's memory.

    Attributes:
        segment: The kind of memory, as NIXL calls it: of the host, or of a GPU.
        gpu: Number of the GPU, as the peer's process counts them; 0 for the host.
        spans: In the order of the image.
    """

    segment: Literal["DRAM", "VRAM"]
    gpu: int
    spans: tuple[Span, ...]


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer serves.

    Attributes:
        format: `FORMAT`.
        manifest: As in a snapshot, with one shard for each image, that is no file; the JSON of it.
        metadata: NIXL's, by which the memory can be read.
        reaches: Of the images, in their order.
    """

    format: str
    manifest: msgspec.Raw
    metadata: bytes
    reaches: tuple[Reach, ...]


class _Format(msgspec.Struct, frozen=True):
    format: str


def understood(text: bytes, where: str) -> tuple[Offer, Manifest]:
    """Read an offer, and check all that can be checked without reading memory.

    Args:
        text: JSON.
        where: The peer, for messages.

    Raises:
        SnapshotMismatch: It is of another version of GMS, or its images are not of one engine.
        SnapshotDamaged: It is no offer, or contradicts itself.
    """
    try:
        found = msgspec.json.decode(text, type=_Format).format
        if found != FORMAT:
            raise SnapshotMismatch(f"{where} speaks {found!r}, not {FORMAT!r}", hint="Use the same version of GMS on both machines.")
        offer = msgspec.json.decode(text, type=Offer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(f"what {where} has sent is no offer: {error}", hint="Is it gms snapshot serve that listens there?") from error
    manifest = decode(bytes(offer.manifest), where)
    sizes = [sum(span.size for span in reach.spans) for reach in offer.reaches]
    if sizes != [image.size for image in manifest.images] or any(span.size <= 0 or span.begin < 0 for reach in offer.reaches for span in reach.spans):
        raise SnapshotDamaged(f"{where} does not say where all bytes of its images are", hint="Use the same version of GMS on both machines.")
    check_alike([(f"{image.pool} at {where}", image.identity) for image in manifest.images])
    return offer, manifest


def parts(spans: Sequence[Span], offset: int, size: int) -> list[Span]:
    """Where a part of an image lies in the peer's memory."""
    found, end = [], 0
    for span, begin in zip(spans, itertools.accumulate((span.size for span in spans), initial=0), strict=False):
        end = begin + span.size
        first, last = max(offset, begin), min(offset + size, end)
        if first < last:
            found.append(Span(span.begin + first - begin, last - first))
        if end >= offset + size:
            break
    return found
