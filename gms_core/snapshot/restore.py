"""One image of a snapshot, brought back: into a generation that is like any other, or, to verify it, into nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.errors import LeaseConflict, SnapshotDamaged, SnapshotMismatch
from gms_core.layout import Identity, layout_digest
from gms_core.snapshot.manifest import Image
from gms_core.snapshot.memories import DiscardingMemory, memory_for
from gms_core.snapshot.plan import pieces
from gms_core.snapshot.reading import ImageSource, OpenSnapshot
from gms_core.snapshot.running import OnTransfer, running
from gms_core.snapshot.transfer import File, Job, Moved, TransferBackend

_kept: list[object] = []
"""Drafts that something may still be written to. They stay to the end of the process."""

MEMORY_S = 60.0
"""Seconds that a restore waits for memory that others release."""


@dataclass(frozen=True, slots=True)
class Restored:
    """An image that is published again.

    Attributes:
        lease: Reads it; the generation stays committed when the lease is released, too.
        image: What was saved.
        moved: What the transfer tells of itself.
        seconds: What was spent besides it, or while it went on: ``prepare``, ``acquire``, ``memory`` and ``commit``.
    """

    lease: ReadLease
    image: Image
    moved: Moved
    seconds: Mapping[str, float] = field(default_factory=dict)


def check_fits(image: Image, driver: str, granularity: int, expected: Identity | None = None) -> None:
    """Refuse an image that cannot be restored to a device, or is not what is wanted. Pure.

    Args:
        image: Of a snapshot.
        driver: Of the device.
        granularity: Of the device.
        expected: What the image has to be; None for whatever it is.

    Raises:
        SnapshotMismatch: It is of another kind of memory, its allocations do not fit the device's granularity, or it is of something else.
    """
    if image.device.driver != driver:
        raise SnapshotMismatch(
            f"the image of pool {image.pool!r} was saved from {image.device.driver} memory, and this device has {driver} memory",
            hint="Restore it to a device of the same kind: weights are laid out for the engine's device.",
        )
    if any(number % granularity for pair in image.allocations for number in pair):
        raise SnapshotMismatch(
            f"the allocations of the image of pool {image.pool!r} are multiples of {image.device.granularity} bytes, as device {image.device.id} "
            f"has them, and not of this device's {granularity}",
            hint="Publish from the checkpoint on this kind of device, and save that.",
        )
    if expected is not None and (differences := expected.differences(Identity(image.identity))):
        facts = "; ".join(f"{name}: {difference}" for name, difference in differences.items())
        raise SnapshotMismatch(f"the snapshot's image of pool {image.pool!r} is not what is wanted: {facts}", details=differences)


def restore_image(
    session: Session,
    snapshot: ImageSource,
    index: int,
    backend: TransferBackend,
    *,
    pool: str = "",
    expected: Identity | None = None,
    timeout_s: float,
    replace: int | None = None,
    pin: bool = False,
    memory_timeout_s: float = MEMORY_S,
    workers: int = 0,
    options: Mapping[str, str] | None = None,
    at_once: int = 1,
    on_transfer: OnTransfer | None = None,
    on_wait: Callable[[str], None] | None = None,
    before_commit: Callable[[], None] | None = None,
    on_hang: Callable[[BaseException], None] | None = None,
) -> Restored:
    """Publish an image as the next generation of a pool. Files are read before the memory is there.

    Args:
        session: With the server of the device that gets it.
        snapshot: It is open; or whatever else images come from.
        index: Of the image.
        backend: Moves the bytes.
        pool: To publish it in; the one that it was saved from if empty.
        expected: What the image has to be; None for whatever it is.
        timeout_s: Seconds to wait for the right to write.
        replace: Drop this committed generation first, once it has no readers.
        pin: Keep the generation without readers, also when a later one is committed.
        memory_timeout_s: Seconds to wait for memory that others release.
        workers: Threads; 0 for as many as suit the backend.
        options: The backend's own.
        at_once: Images that are moved at once on this machine, this one among them.
        on_transfer: Is told of the transfer.
        on_wait: Is told of what is waited for.
        before_commit: Is called once all is there as it was saved. It may wait, such as for images of other devices, and what it raises keeps this
            one from being published.
        on_hang: Is told of the error when the transfer has failed, and may still write to the memory: the device's server must not have that back
            before. The draft stays then, mapped and leased; end the process with the session open, which lets the kernel end it all first.

    Raises:
        SnapshotMismatch: The image is not what is wanted, or does not fit the device.
        SnapshotNotFound: A root or a file is missing.
        SnapshotDamaged: The bytes are not those that were saved.
        GmsError: As session and backend say. Whatever is raised before the commit: nothing is published, and the lease is given up, except after
            `on_hang`.
    """
    begin, image = time.monotonic(), snapshot.image(index)
    check_fits(image, session.welcome.driver, session.welcome.granularity, expected)
    job = job_of(image, snapshot.files(index), workers, options, objects=snapshot.objects, at_once=at_once)
    identity = Identity(image.identity)
    # What copies need, such as the device's context, is given up last: the lease still maps memory that copies have written to.
    with contextlib.ExitStack() as held:
        memory = held.enter_context(memory_for(session.device, image.allocations))
        stack = held.enter_context(contextlib.ExitStack())

        def hung(error: BaseException) -> None:
            _kept.append((held.pop_all(), session))
            if on_hang is not None:
                on_hang(error)

        with running(backend, job, memory, on_transfer, hung) as transfer:
            prepared = time.monotonic()
            lease = session.acquire(
                pool or image.pool, "rw", identity, timeout_s=timeout_s, on_wait=on_wait, replace=replace, memory_timeout_s=memory_timeout_s
            )
            stack.push(lease)  # it is given up only when the transfer has ended, which writes to its memory
            if not isinstance(lease, WriteLease):
                raise LeaseConflict(f"pool {lease.pool!r} was granted for reading alone")
            acquired = time.monotonic()
            lease.arena.back(image.allocations)
            memory.ready(lease.arena.base)
            backed = time.monotonic()
            moved = transfer.finish()
        finished = time.monotonic()
        check_moved(backend, job, moved)
        if layout_digest(identity, lease.arena.allocations, image.tensors) != image.digest:
            raise SnapshotDamaged(
                f"the memory of pool {lease.pool!r} is not laid out as the snapshot was", hint="Nothing is published. Restore anew."
            )
        if before_commit is not None:
            before_commit()
        read = stack.enter_context(lease.commit(image.tensors, identity, pin=pin))
        if read.layout.digest != image.digest:
            raise SnapshotDamaged(f"the server says that generation {read.layout.generation} is not what was saved", hint="Roll the pool back.")
        stack.pop_all()
    seconds = {"prepare": prepared - begin, "acquire": acquired - prepared, "memory": backed - acquired, "commit": time.monotonic() - finished}
    return Restored(read, image, moved, seconds)


def verify_image(
    snapshot: OpenSnapshot,
    index: int,
    backend: TransferBackend,
    *,
    workers: int = 0,
    options: Mapping[str, str] | None = None,
    on_transfer: OnTransfer | None = None,
) -> Moved:
    """Read all files of an image, and compare every block with its checksum. Needs no device and no server.

    Args:
        snapshot: It is open.
        index: Of the image.
        backend: Reads the files.
        workers: Threads; 0 for as many as suit the backend.
        options: The backend's own.
        on_transfer: Is told of the transfer.

    Raises:
        SnapshotNotFound: A root or a file is missing.
        SnapshotDamaged: The bytes are not those that were saved.
        GmsError: As the backend says.
    """
    job = replace(job_of(snapshot.image(index), snapshot.files(index), workers, options, objects=snapshot.objects), from_disk=True)
    with DiscardingMemory() as memory, running(backend, job, memory, on_transfer) as transfer:
        moved = transfer.finish()
    check_moved(backend, job, moved)
    return moved


def job_of(image: Image, files: Sequence[File], workers: int, options: Mapping[str, str] | None, *, objects: bool = False, at_once: int = 1) -> Job:
    """The job that reads all of an image."""
    checksums = [int(checksum, 16) for checksum in image.checksums]
    work = list(pieces(image.stripes, image.block_bytes))
    return Job("restore", files, work, checksums, image.block_bytes, workers, options or {}, objects, at_once=at_once)


def check_moved(backend: TransferBackend, job: Job, moved: Moved) -> None:
    """Raise `SnapshotDamaged` unless a transfer has moved every block, each with its checksum: a backend is not believed, it may be a plugin."""
    wrong = [piece for piece in job.pieces if moved.checksums.get(piece.block) != job.checksums[piece.block]]
    if wrong or moved.bytes != job.size:
        where = f", from block {wrong[0].block} in {job.files[wrong[0].shard].path} on" if wrong else ""
        raise SnapshotDamaged(
            f"transfer backend {backend.name} has moved {moved.bytes} of {job.size} bytes, and {len(wrong)} blocks wrongly{where}",
            hint="Verify the snapshot, and restore it with another backend.",
        )
