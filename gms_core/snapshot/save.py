"""One image of a snapshot: what a read lease maps, brought into the staging folders and synced, or into objects."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gms_core.client import ReadLease, Session
from gms_core.errors import SnapshotDamaged, SnapshotMismatch, SnapshotNotFound, TransferFailed
from gms_core.layout import Layout
from gms_core.snapshot.folders import Folder, explained
from gms_core.snapshot.manifest import BLOCK_BYTES, FORMAT, Device, Image, Shard
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.objects.target import ObjectTarget
from gms_core.snapshot.on_disk import IMAGES, ImagePlan, image_folder, image_plan, read, write
from gms_core.snapshot.plan import lay_out, pieces
from gms_core.snapshot.resuming import still_right
from gms_core.snapshot.roots import check_room
from gms_core.snapshot.running import OnTransfer, running
from gms_core.snapshot.staging import Target
from gms_core.snapshot.transfer import File, Job, Moved, TransferBackend

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """An image whose shards are synced, or complete.

    Attributes:
        image: For the manifest.
        moved: What the transfer tells of itself.
        kept_bytes: Bytes that a save that was resumed had written already.
        seconds: What was spent besides the transfer: ``prepare``, ``compare`` and ``sync``.
    """

    image: Image
    moved: Moved
    kept_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def save_image(
    session: Session,
    lease: ReadLease,
    target: Target | ObjectTarget,
    index: int,
    backend: TransferBackend,
    *,
    workers: int = 0,
    options: Mapping[str, str] | None = None,
    on_transfer: OnTransfer | None = None,
) -> Saved:
    """Save what a lease reads. Nobody else may save an image of this index to the target.

    Args:
        session: Of the lease.
        lease: It is mapped, if it is not yet.
        target: Of `gms_core.snapshot.shelves.Save`, which need not be in this process.
        index: Of the image in the snapshot.
        backend: Moves the bytes.
        workers: Threads; 0 for as many as suit the backend.
        options: The backend's own.
        on_transfer: Is told of the transfer.

    Raises:
        TransferFailed: A disk is full, or has failed; or an object store does not answer as it should.
        GmsError: As the backend says. Nothing is left under way.
    """
    begin, layout, arena = time.monotonic(), lease.layout, lease.map()
    plan = _plan(target, index, layout)
    resumes = False
    if isinstance(target, ObjectTarget):
        files = [target.file(shard) for shard in plan.shards]  # each comes into being when it is complete
    else:
        resumes = _take_up(target, index, plan)
        _check_room(target, plan.shards)
        files = [_make(target, shard) for shard in plan.shards]
    work = list(pieces(plan.stripes, plan.block_bytes))
    allocations = tuple((one.offset, one.size) for one in layout.allocations)
    with memory_for(session.device, allocations) as memory:
        memory.ready(arena.base)
        prepared = time.monotonic()
        known = still_right(files, work, memory, plan.block_bytes, workers) if resumes else {}
        compared = time.monotonic()
        left = [piece for piece in work if piece.block not in known]
        job = Job("save", files, left, (), plan.block_bytes, workers, options or {}, objects=isinstance(target, ObjectTarget))
        with running(backend, job, memory, on_transfer) as transfer:
            moved = transfer.finish()
    checksums = {**known, **moved.checksums}
    if checksums.keys() != {piece.block for piece in work} or moved.bytes != job.size:
        raise TransferFailed(
            f"transfer backend {backend.name} has moved {moved.bytes} of {job.size} bytes, and said nothing", hint="Use another one."
        )
    copied = time.monotonic()
    if isinstance(target, Target):
        _sync(target, index, files)
    seconds = {"prepare": prepared - begin, "compare": compared - prepared, "sync": time.monotonic() - copied}
    image = Image(
        pool=lease.pool,
        generation=layout.generation,
        device=Device(session.welcome.device, session.welcome.driver, session.welcome.granularity),
        identity=dict(layout.identity.fields),
        digest=layout.digest,
        allocations=allocations,
        tensors=layout.manifest,
        shards=plan.shards,
        stripes=plan.stripes,
        block_bytes=plan.block_bytes,
        checksums=tuple(f"{checksums[piece.block]:016x}" for piece in work),
    )
    return Saved(image, moved, sum(piece.size for piece in work if piece.block in known), seconds)


def _plan(target: Target | ObjectTarget, index: int, layout: Layout) -> ImagePlan:
    asked = target.plan
    shards, stripes = lay_out(layout.size, image_folder(index), target.places, stripe_bytes=asked.stripe_bytes, shard_bytes=asked.shard_bytes)
    return ImagePlan(FORMAT, layout.digest, BLOCK_BYTES, shards, stripes)


def _take_up(target: Target, index: int, plan: ImagePlan) -> bool:
    """Find out whether the files of a former save are those of this plan; what is of another plan is removed."""
    name = image_plan(index)
    with Folder.open(target.first) as first:
        if target.resumed:
            with contextlib.suppress(SnapshotNotFound, SnapshotDamaged, SnapshotMismatch):
                if read(first.read(name), ImagePlan, first.path / name) == plan:
                    return True
                log.info("image %d of %s was of another layout: it is saved from the beginning", index, target.plan.name)
        first.unlink(name)
        for folder in target.folders.values():
            with Folder.open(Path(folder)) as inside, inside.make(IMAGES) as images:
                images.remove(str(index))
        first.write(name, write(plan))
    return False


def _check_room(target: Target, shards: Iterable[Shard]) -> None:
    """Refuse early what cannot fit. What is there already of a save that is resumed needs no more room."""
    needed = dict.fromkeys(map(Path, target.folders.values()), 0)
    for shard in shards:
        folder = Path(target.folders[shard.root])
        there = 0
        with explained("looked at", folder / shard.path), contextlib.suppress(FileNotFoundError):
            there = (folder / shard.path).lstat().st_blocks * 512
        needed[folder] += max(0, shard.size - there)
    check_room(needed)


def _make(target: Target, shard: Shard) -> File:
    """Make a shard's file, or take the one that is there, with all its room."""
    path = Path(target.folders[shard.root]) / shard.path
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder.open(Path(target.folders[shard.root])))
        *folders, name = shard.path.split("/")
        for each in folders:
            folder = stack.enter_context(folder.make(each))
        descriptor = folder.open_file(name, os.O_RDWR | os.O_CREAT)
        try:
            with explained("given its room", path):
                if os.fstat(descriptor).st_size > shard.size:
                    os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, shard.size)
        finally:
            os.close(descriptor)
    return File(path, shard.root, shard.size)


def _sync(target: Target, index: int, files: Sequence[File]) -> None:
    """Have the disks keep what was written: each root by itself, all at once.

    Raises:
        TransferFailed: A disk has failed.
    """

    def sync_root(root: str) -> None:
        for file in files:
            if file.root == root:
                with explained("synced", Path(file.path)):
                    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    try:
                        os.fdatasync(descriptor)
                    finally:
                        os.close(descriptor)
        with Folder.open(Path(target.folders[root])) as inside, inside.make(IMAGES) as images, images.make(str(index)) as image:
            image.sync()
            images.sync()

    with ThreadPoolExecutor(len(target.folders), thread_name_prefix="gms-sync") as pool:
        list(pool.map(sync_root, target.folders))
