"""How a snapshot comes into being: under a name that says that it is none yet, and all at once.

Shards are written and synced in staging folders, one in each root. A commit syncs all folders, gives them the version's name (in the first root
last), and writes ``manifest.json`` and at last ``COMMITTED`` into the first. Whenever the process is killed before that, there is no snapshot, the
ones before are untouched, and the next save or removal under the name takes away what was left. While a save goes on, its process and those that
write for it have the locks of the name.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import xxhash

from gms_core import __version__
from gms_core.errors import GmsError, InvalidArgument, SnapshotBusy, SnapshotDamaged, SnapshotMismatch, SnapshotNotFound
from gms_core.snapshot.folders import Folder
from gms_core.snapshot.locks import NameLock, lock_for_removing
from gms_core.snapshot.manifest import FORMAT, Image, Manifest, decode, encode
from gms_core.snapshot.on_disk import (
    COMMITTED,
    FAILED,
    IMAGES,
    MANIFEST,
    PART,
    PLAN,
    Committed,
    Part,
    Reference,
    StagingPlan,
    Unfinished,
    failure,
    read,
    unfinished,
    write,
)
from gms_core.snapshot.plan import SHARD_BYTES, STRIPE_BYTES, WeightedRoot, check_sizes
from gms_core.snapshot.pruning import sweep, versions_of
from gms_core.snapshot.roots import Root

log = logging.getLogger(__name__)

_IMAGE_PLAN = re.compile(r"plan-[0-9]+\.json")


class Target(msgspec.Struct, frozen=True, tag="directories"):
    """Where the images of a save go, in directories: all that a process has to know that saves one of them. It can be sent as JSON, and pickled.

    Attributes:
        plan: Over what the save is laid out; the first root is first.
        folders: The staging folder in each root, by the root's id.
        resumed: Whether some of it may be there already.
    """

    plan: StagingPlan
    folders: dict[str, str]
    resumed: bool

    @property
    def places(self) -> tuple[WeightedRoot, ...]:
        """The roots that images are laid over."""
        return tuple(WeightedRoot(root, weight) for root, weight in self.plan.roots)

    @property
    def first(self) -> Path:
        """The staging folder in the first root."""
        return Path(self.folders[self.plan.roots[0][0]])


class Staging:
    """A save that goes on. It ends by `commit`, or without a snapshot; as a context manager it tells in a file why, if an error ended it.

    Attributes:
        target: For those who save its images.
        swept: Folders of former saves that were removed when it began.
    """

    def __init__(self, lock: NameLock, target: Target, swept: Sequence[str]) -> None:
        self.target = target
        self.swept = tuple(swept)
        self._lock = lock
        self._ended = self._committed = False

    @classmethod
    def begin(
        cls,
        roots: Sequence[Root],
        name: str,
        *,
        resume: bool = False,
        weights: Mapping[str, float] | None = None,
        stripe_bytes: int = STRIPE_BYTES,
        shard_bytes: int = SHARD_BYTES,
    ) -> Self:
        """Begin to save the next version of a name. What was left of former saves under it is removed.

        Args:
            roots: What the images are laid over. The first one gets the manifest.
            name: The snapshot's.
            resume: Go on with the newest save that has ended without a snapshot, if there is one; as that was laid out.
            weights: How much of the images a root gets in proportion to the others, by its id; 1 where nothing is said.
            stripe_bytes: Of the stripes.
            shard_bytes: Of the largest file.

        Raises:
            InvalidArgument: It is no name, a size is wrong, a weight is not positive, or one is for a root that was not given.
            SnapshotBusy: Another process saves or prunes under that name.
            SnapshotMismatch: What is to be resumed lies in other roots.
            TransferFailed: A disk is full, or has failed.
        """
        weights = weights or {}
        check_sizes(stripe_bytes, shard_bytes)
        if not roots or weights.keys() - {root.id for root in roots} or any(not 0 < weight < math.inf for weight in weights.values()):
            raise InvalidArgument("a snapshot needs a root, and each weight is a positive number of one of them")
        lock = NameLock(roots, name)
        try:
            former = _resumable(lock) if resume else None
            swept = sweep(lock, Unfinished("staging", former.version, former.id) if former is not None else None)
            plan = former or StagingPlan(
                FORMAT,
                name,
                1 + max(lock.last_version(), *(max(versions_of(folder), default=0) for folder in lock.folders.values())),
                secrets.token_hex(8),
                tuple((root.id, float(weights.get(root.id, 1.0))) for root in roots),
                stripe_bytes,
                shard_bytes,
            )
            lock.begin_version(plan.version)
            folders = {root: str(_prepare(lock.folders[root], plan)) for root, _ in plan.roots}
            staging = cls(lock, Target(plan, folders, former is not None), swept)
            staging._begin(former is not None)
        except BaseException:
            lock.close()
            raise
        return staging

    def _begin(self, resumed: bool) -> None:
        with self._first() as first:
            if resumed:
                first.unlink(FAILED)
            else:
                first.write(PLAN, write(self.target.plan))

    @property
    def locks(self) -> tuple[int, ...]:
        """Descriptors of the name's locks: a process that writes for this save has them too, so that nobody takes up its files while it is there."""
        return self._lock.descriptors

    @property
    def reference(self) -> Reference:
        """Name and version of what is being saved."""
        return Reference(self.target.plan.name, self.target.plan.version)

    def commit(self, images: Sequence[Image]) -> Manifest:
        """Make a snapshot of images whose shards are synced.

        Args:
            images: In the order of the devices.

        Returns:
            The manifest, once the snapshot is there for good.

        Raises:
            SnapshotDamaged: The images contradict themselves, or a file is not as it should be: it would be no good snapshot.
            TransferFailed: A disk is full, or has failed.
            GmsError: Or the kernel refused something else. Whatever is raised, there is no snapshot once `fail` was called.
        """
        plan = self.target.plan
        if self.target.resumed:
            self._drop_images(len(images))
        manifest = Manifest(FORMAT, plan.name, plan.version, plan.id, _now(), __version__, tuple(images))
        text = encode(manifest)
        decode(text, f"the manifest of {self.reference}")  # what would be refused when it is read is not written
        self._check_files(manifest)
        for root in self._roots():
            with self._lock.folders[root].child(self._folder) as inside:
                inside.sync_all()
        for root in reversed(self._roots()):
            self._lock.folders[root].rename(self._folder, str(plan.version))
        with self._first() as first:
            first.write(MANIFEST, text)
            first.write(COMMITTED, write(Committed(FORMAT, plan.id, xxhash.xxh3_64_hexdigest(text))))
        self._ended = self._committed = True
        log.info("snapshot %s is saved: %d bytes", self.reference, manifest.size)
        return manifest

    def fail(self, error: BaseException) -> None:
        """Write down why there will be no snapshot; for people and for `resume`, until the next save under the name. Never raises."""
        if self._ended:
            return
        self._ended = True
        try:
            with self._first() as first:
                if first.has(COMMITTED):  # it was written, but not for good
                    self._take_back(first)
                first.write(FAILED, write(failure(error, _now())))
        except (GmsError, OSError) as untold:
            log.warning("why snapshot %s was not saved cannot be written down: %s", self.reference, untold)

    def _take_back(self, first: Folder) -> None:
        held = lock_for_removing(first, MANIFEST)
        if held is None:
            raise SnapshotBusy(f"{self.reference} is being read already")
        try:
            first.unlink(COMMITTED)
        finally:
            os.close(held)

    def close(self) -> None:
        """Let others save under the name. Idempotent."""
        self._ended = True
        try:
            if self._committed:
                self._drop_plans()
        finally:
            self._lock.close()

    def _drop_plans(self) -> None:
        """Remove what only a save needs. Until it is committed that is there, so that it can be resumed."""
        self._committed = False
        try:
            with self._first() as first:
                for name in first.names():
                    if name == PLAN or _IMAGE_PLAN.fullmatch(name):
                        first.unlink(name)
        except GmsError as error:
            log.warning("plans of snapshot %s are left, and do no harm: %s", self.reference, error)

    def _drop_images(self, count: int) -> None:
        """Remove images that a former save had, and this one has not."""
        for root in self._roots():
            with self._lock.folders[root].child(self._folder) as inside, inside.child(IMAGES) as images:
                for name in images.names():
                    if name.isdecimal() and int(name) >= count:
                        images.remove(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self.fail(error)
            elif not self._ended:
                self.fail(GmsError("the save ended without a commit"))
        finally:
            self.close()

    @property
    def _folder(self) -> str:
        return Unfinished("staging", self.target.plan.version, self.target.plan.id).folder

    def _roots(self) -> list[str]:
        return [root for root, _ in self.target.plan.roots]

    def _first(self) -> Folder:
        """The folder in the first root, whatever it is called by now."""
        named = self._lock.folders[self._roots()[0]]
        try:
            return named.child(self._folder)
        except SnapshotNotFound:
            return named.child(str(self.target.plan.version))

    def _check_files(self, manifest: Manifest) -> None:
        """Raise `SnapshotDamaged` unless the staging folders hold the files of all images, and no others."""
        wanted = {(shard.root, shard.path): shard.size for image in manifest.images for shard in image.shards}
        if len(wanted) != sum(len(image.shards) for image in manifest.images):
            raise SnapshotDamaged(f"two images of {self.reference} have the same file", hint="Save each image under an index of its own.")
        found: dict[tuple[str, str], int] = {}
        for root in self._roots():
            with self._lock.folders[root].child(self._folder) as inside, inside.child(IMAGES) as images:
                found.update({(root, f"{IMAGES}/{path}"): size for path, size in images.files().items()})
        for place in sorted(wanted.keys() | found.keys()):
            if wanted.get(place) != found.get(place):
                path = Path(self.target.folders.get(place[0], "?")) / place[1]
                raise SnapshotDamaged(
                    f"{path} has {found.get(place, 'no')} bytes where the images have {wanted.get(place, 'none')}",
                    hint="Something else has changed the staging folder: save anew.",
                )


def _now() -> str:
    """The time as RFC 3339 in UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _prepare(named: Folder, plan: StagingPlan) -> Path:
    """Make the staging folder of a root, or find it as it was left."""
    with named.make(Unfinished("staging", plan.version, plan.id).folder) as inside:
        inside.write(PART, write(Part(FORMAT, plan.name, plan.version, plan.id, plan.roots[0][0])))
        with inside.make(IMAGES):
            inside.sync()
        named.sync()
        return inside.path


def _resumable(lock: NameLock) -> StagingPlan | None:
    """The plan of the newest save that can be resumed; None if there is none, or if its number is not the last one: that would come twice.

    Raises:
        SnapshotMismatch: It lies in other roots than those that were given.
    """
    found: list[StagingPlan] = []
    for folder in lock.folders.values():
        for begun in filter(None, map(unfinished, folder.names())):
            if begun.kind != "staging":
                continue
            with folder.child(begun.folder) as inside, contextlib.suppress(SnapshotDamaged, SnapshotMismatch, SnapshotNotFound):
                plan = read(inside.read(PLAN), StagingPlan, inside.path / PLAN)
                if (plan.name, plan.version, plan.id) == (lock.name, begun.version, begun.id) and plan.roots:
                    found.append(plan)
    if not found:
        return None
    newest = max(found, key=lambda plan: plan.version)
    if newest.version < lock.last_version():
        log.info("the save of %s@%d is not resumed: %d was begun since", lock.name, newest.version, lock.last_version())
        return None
    if {root for root, _ in newest.roots} != lock.folders.keys():
        raise SnapshotMismatch(
            f"the save of {lock.name}@{newest.version} that can be resumed lies in roots {', '.join(sorted(root for root, _ in newest.roots))}, "
            "and these are others",
            hint="Give those roots with --root, or save without resuming.",
        )
    return newest
