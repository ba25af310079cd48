"""A whole snapshot: an image of each device, moved by a process each, with the commit and the sentinels around it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gms_core.devices import DeviceId
from gms_core.errors import GmsError, InvalidArgument, TransferCancelled
from gms_core.snapshot.config import SnapshotConfig
from gms_core.snapshot.control import Control
from gms_core.snapshot.manifest import BLOCK_BYTES, Image, Manifest
from gms_core.snapshot.matching import check_alike, check_expected
from gms_core.snapshot.on_disk import Reference, reference
from gms_core.snapshot.orders import Done, PullOrder, RestoreOrder, SaveOrder, VerifyOrder
from gms_core.snapshot.processes import Task, Watch, carry_out
from gms_core.snapshot.registry import find, usable
from gms_core.snapshot.running import check, verifies
from gms_core.snapshot.shelves import open_shelf
from gms_core.snapshot.transfer import Direction, Job
from gms_core.stop_signals import raising


class Place(NamedTuple):
    """A pool of a device's server.

    Attributes:
        device: Of the server.
        socket: Of the server.
        pool: Its name.
        digest: Of what is committed there; empty if nothing is.
    """

    device: DeviceId
    socket: Path
    pool: str
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.pool} on {self.device}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a snapshot.

    Attributes:
        manifest: Its own.
        images: What people call each image, and what was done with it; None if there was nothing to do.
        untold: Why a sentinel could not be written; None if all were. The snapshot does not depend on it.
    """

    manifest: Manifest
    images: Sequence[tuple[str, Done | None]]
    untold: GmsError | None = None


def save_snapshot(places: Callable[[], Sequence[Place]], name: str, config: SnapshotConfig, watch: Watch, *, resume: bool = False) -> Outcome:
    """Save what pools have committed as the next version of a name. For the main thread only.

    Args:
        places: Finds the pools, in the order of the images. What it raises is told by the sentinels too.
        name: The snapshot's.
        config: How.
        watch: Is told how far each image is.
        resume: Go on with the newest save that has ended without a snapshot, if there is one.

    Raises:
        GmsError: There is no new snapshot; those that were there are untouched.
        KeyboardInterrupt: Likewise.
    """
    with Control(config.control_dir, name, "save") as control, told_to_end() as too_late:
        if config.objects:
            control.alone()
        _check_backend(config, "save")
        chosen = places()
        shelf = open_shelf(config.roots, create=True)
        # The sentinels are those of whoever has the lock: they are begun, and ended, under it. In an object store, it is a lock of their own.
        with shelf.begin(name, resume=resume, stripe_bytes=config.stripe_bytes, shard_bytes=config.shard_bytes) as staging, control:
            control.about(staging.target.plan.version, staging.target.plan.id)
            control.begin()

            def order(index: int, place: Place) -> SaveOrder:
                return SaveOrder(
                    index=index,
                    backend=config.mover,
                    workers=config.save_workers,
                    options=config.options,
                    socket=str(place.socket),
                    pool=place.pool,
                    target=staging.target,
                )

            names = [str(place) for place in chosen]
            done = carry_out([Task(names[index], order(index, place), place.device) for index, place in enumerate(chosen)], watch, staging.locks)
            images = [one.image for one in done if one.image is not None]
            check_alike([(who, image.identity) for who, image in zip(names, images, strict=True)])
            manifest = staging.commit(images)
            too_late()
            control.done()
        return Outcome(manifest, list(zip(names, done, strict=True)), control.close())


def restore_snapshot(
    wanted: str,
    config: SnapshotConfig,
    places: Callable[[Sequence[Image]], Sequence[Place]],
    watch: Watch,
    *,
    expected: Mapping[str, str] | None = None,
    if_missing: bool = False,
    replace: int | None = None,
    pin: bool = False,
    timeout_s: float,
    memory_timeout_s: float,
) -> Outcome:
    """Publish the images of a snapshot, together. For the main thread only.

    Args:
        wanted: ``NAME@VERSION``, or ``NAME`` for the newest version.
        config: How.
        places: Says where each image goes, once it is known which there are.
        watch: Is told how far each image is.
        expected: Fields that the identity of each image must have.
        if_missing: Leave out what is committed already.
        replace: Drop this committed generation first, once it has no readers.
        pin: Keep the generations without readers.
        timeout_s: Seconds to wait for the right to write.
        memory_timeout_s: Seconds to wait for memory that others release.

    Raises:
        GmsError: As `gms_core.snapshot.restore.restore_image` says.
        KeyboardInterrupt: Nothing is published unless all images had arrived.
    """
    asked = reference(wanted)
    with Control(config.control_dir, asked.name, "restore") as control, told_to_end() as too_late:
        control.begin()
        shelf = open_shelf(config.roots)
        with shelf.find(wanted) as snapshot:
            manifest = snapshot.manifest
            control.about(manifest.version, manifest.id)
            check_expected(manifest.images, expected or {})
            _check_backend(config, "restore")

            def order(index: int, place: Place) -> RestoreOrder:
                return RestoreOrder(
                    index=index,
                    backend=config.mover,
                    workers=config.load_workers,
                    options=config.options,
                    socket=str(place.socket),
                    pool=place.pool,
                    roots=tuple(map(str, shelf.roots)),
                    snapshot=str(Reference(manifest.name, manifest.version)),
                    id=manifest.id,
                    timeout_s=timeout_s,
                    memory_timeout_s=memory_timeout_s,
                    replace=replace,
                    pin=pin,
                )

            images = publish_together(manifest.images, places(manifest.images), order, watch, if_missing=if_missing)
            too_late()
        control.done()
        return Outcome(manifest, images, control.close())


def publish_together(
    images: Sequence[Image],
    places: Sequence[Place],
    order: Callable[[int, Place], RestoreOrder | PullOrder],
    watch: Watch,
    *,
    if_missing: bool,
) -> list[tuple[str, Done | None]]:
    """Publish images, each by a process of its own, once all have arrived.

    Args:
        images: Of one manifest.
        places: Where each goes.
        order: What the process of an image is told, by the image's index and its place.
        watch: Is told how far each image is.
        if_missing: Leave out what is committed already.

    Returns:
        See `Outcome.images`.
    """
    missing = [index for index, place in enumerate(places) if not (if_missing and place.digest == images[index].digest)]
    tasks = [Task(str(places[index]), order(index, places[index]), places[index].device) for index in missing]
    done = dict(zip(missing, carry_out(tasks, watch), strict=True))
    return [(str(place), done.get(index)) for index, place in enumerate(places)]


def verify_snapshot(wanted: str, config: SnapshotConfig, watch: Watch) -> Outcome:
    """Compare every byte of a snapshot with its checksums: one image after the other, since all of them are on the same disks.

    Args:
        wanted: ``NAME@VERSION``, or ``NAME`` for the newest version.
        config: How.
        watch: Is told how far each image is.

    Raises:
        InvalidArgument: The backend reads into a device's memory alone.
        SnapshotDamaged: It is not what was saved.
        GmsError: As `gms_core.snapshot.restore.verify_image` says.
    """
    shelf = open_shelf(config.roots)
    with told_to_end(), shelf.find(wanted) as snapshot:
        manifest = snapshot.manifest
        _check_backend(config, "restore")
        if not verifies(find(config.mover)):
            raise InvalidArgument(
                f"the transfer backend {config.mover!r} reads into a device's memory alone, and verifies nothing", hint="Use --backend staged."
            )
        done: list[tuple[str, Done | None]] = []
        for index, image in enumerate(manifest.images):
            name = f"image {index} ({image.pool})"
            order = VerifyOrder(
                index=index,
                backend=config.mover,
                workers=config.load_workers,
                options=config.options,
                roots=tuple(map(str, shelf.roots)),
                snapshot=str(Reference(manifest.name, manifest.version)),
                id=manifest.id,
            )
            done.append((name, carry_out([Task(name, order)], watch)[0]))
        return Outcome(manifest, done)


def _check_backend(config: SnapshotConfig, direction: Direction) -> None:
    """Raise unless the backend can be used here, in this way and with these options, before anything is begun that would have to be undone."""
    workers = config.save_workers if direction == "save" else config.load_workers
    check(usable(config.mover), Job(direction, (), (), (), BLOCK_BYTES, workers, config.options, config.objects))


def told_to_end() -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Within, SIGTERM ends everything in order, as Ctrl-C does; until what it yields is called, for then there is a snapshot, or all is published."""
    return raising(signal.SIGTERM, lambda: TransferCancelled("it was told to end by SIGTERM"))
