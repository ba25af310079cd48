"""Which pool becomes which image of a snapshot, and which image goes to which device. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from gms_core.devices import HOST
from gms_core.errors import InvalidArgument, SnapshotMismatch
from gms_core.snapshot.manifest import Image

ALIKE = ("content", "model", "revision", "engine", "engine_version", "dtype")
"""Fields of the identity in which all ranks of one engine agree."""
RANKS = ("dp", "pp", "tp")
"""Fields that tell a rank, as ``RANK/COUNT``; the one that counts most first."""

Found = TypeVar("Found")


class Destination(NamedTuple):
    """Where an image goes.

    Attributes:
        image: Its number in the snapshot.
        device: Of the server.
        pool: To publish it in.
    """

    image: int
    device: str
    pool: str

    def __str__(self) -> str:
        return f"{self.pool} on {self.device}"


def rank(identity: Mapping[str, str], pool: str) -> tuple[object, ...]:
    """What to sort the ranks of an engine by: what their identities say, and then the numbers at the end of their pools' names."""
    numbers = [int(found) if (found := identity.get(field, "").partition("/")[0]).isdecimal() else 0 for field in RANKS]
    number = re.search(r"\.([1-9][0-9]*)\Z", pool)
    return (*numbers, int(number[1]) if number else 0, pool)


def check_alike(images: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Refuse images that cannot be one engine's.

    Args:
        images: What people call each, and its identity.

    Raises:
        SnapshotMismatch: They are of several models.
    """
    for field in ALIKE:
        values = {identity.get(field, ""): name for name, identity in images}
        if len(values) > 1:
            told = "; ".join(f"{name} has {value!r}" for value, name in sorted(values.items()))
            raise SnapshotMismatch(
                f"these pools are not ranks of one engine, since they differ in {field}: {told}",
                hint="Name the devices of one engine with --device. If its weights are being updated, save when that has ended.",
            )


def check_expected(images: Sequence[Image], expected: Mapping[str, str]) -> None:
    """Refuse a snapshot whose images are not what a user wants, in the fields that were named.

    Raises:
        SnapshotMismatch: One of them is not.
    """
    for index, image in enumerate(images):
        details = {
            key: f"{value!r} != {image.identity.get(key, '')!r}" for key, value in sorted(expected.items()) if image.identity.get(key, "") != value
        }
        if details:
            facts = "; ".join(f"{key}: {difference}" for key, difference in details.items())
            raise SnapshotMismatch(f"image {index}, of pool {image.pool!r}, is not what is expected: {facts}", details=details)


def destinations(images: Sequence[Image], given: Sequence[str], there: Sequence[str], pool: str = "") -> list[Destination]:
    """Where the images of a snapshot go: each to the device that it was saved from if all of those are there, or else to the devices in their order.

    Args:
        images: Of the snapshot.
        given: Devices that the user has named, in this order; empty if there are none.
        there: Devices that have a server, in the order in which an engine counts them.
        pool: Name of the first image's pool; the others keep what their names have beyond the first one's. Empty: as they were saved.

    Raises:
        InvalidArgument: There are too few devices, or too many were named, or an image cannot be called so.
    """
    pools = [_pool(image.pool, images[0].pool, pool) for image in images]
    if all(image.device.driver == HOST for image in images):
        devices = list(given) or [HOST]
        if devices != [HOST]:
            raise InvalidArgument("this snapshot is of host memory, and can only be restored to it", hint="Name --device host, or none.")
        chosen = [str(HOST)] * len(images)
    else:
        former = [image.device.id for image in images]
        chosen = list(given) or (former if set(former) <= set(there) else [device for device in there if device != HOST])
        if len(chosen) < len(images) or len(given) > len(images):
            raise InvalidArgument(
                f"the snapshot has {len(images)} images, one of each device, and there are {len(chosen)} devices: {', '.join(chosen) or 'none'}",
                hint="Name as many devices with --device, in the order of the images; gms serve has to run on each.",
            )
    found = [Destination(index, device, name) for index, (device, name) in enumerate(zip(chosen, pools, strict=False))]
    places = {(one.device, one.pool) for one in found}
    if len(places) < len(found):
        raise InvalidArgument(
            f"two images would go to one pool: {', '.join(map(str, found))}", hint="Name each device once, and give --pool only for ranks."
        )
    return found


def _pool(saved: str, first: str, wanted: str) -> str:
    if not wanted:
        return saved
    if not saved.startswith(first):
        raise InvalidArgument(f"the snapshot has the pools {first!r} and {saved!r}, so they cannot be called after {wanted!r}")
    return wanted + saved[len(first) :]
