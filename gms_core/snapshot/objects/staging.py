"""How a snapshot comes into being in an object store, where nothing can be renamed or locked.

A version belongs to who has made its ``claim.json``; everything else is written under it, with nobody else at work there. The manifest comes last but
one, and ``COMMITTED`` last. Both are made only where there are none: so whoever has given the version up meanwhile, by making ``COMMITTED`` himself,
is noticed, and nothing is committed of which a part was removed. Whenever the process is killed before that, the snapshots before are untouched.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import xxhash

from gms_core import __version__
from gms_core.errors import GmsError, InvalidArgument, SnapshotBusy, SnapshotDamaged, SnapshotNotFound
from gms_core.snapshot.manifest import FORMAT, Image, Manifest, decode, encode
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.pruning import sweep
from gms_core.snapshot.objects.records import CLAIM, Claim, Removed, now, verdict
from gms_core.snapshot.objects.root import ObjectRoot
from gms_core.snapshot.objects.savers import this_process
from gms_core.snapshot.objects.target import ObjectTarget
from gms_core.snapshot.objects.versions import versions
from gms_core.snapshot.on_disk import (
    COMMITTED,
    FAILED,
    IMAGES,
    LOCK,
    MANIFEST,
    PART,
    Committed,
    Part,
    Reference,
    StagingPlan,
    check_name,
    failure,
    write,
)
from gms_core.snapshot.plan import SHARD_BYTES, STRIPE_BYTES, check_sizes

log = logging.getLogger(__name__)

_TRIES = 100
"""Numbers that are asked for before a save gives up: each that is refused is somebody else's new version."""


class ObjectStaging:
    """A save that goes on. See `gms_core.snapshot.shelves.Save`.

    Attributes:
        target: For those who save its images.
        swept: URLs of former saves that were removed when it began.
        locks: None: there are none in an object store.
    """

    def __init__(self, bucket: Bucket, target: ObjectTarget, swept: Sequence[str]) -> None:
        self.target = target
        self.swept = tuple(swept)
        self.locks: tuple[int, ...] = ()
        self._bucket = bucket
        self._ended = False
        self._seal: bytes | None = None  # what COMMITTED would hold, while it is not certain whether it is there

    @classmethod
    def begin(cls, root: ObjectRoot, name: str, *, resume: bool = False, stripe_bytes: int = STRIPE_BYTES, shard_bytes: int = SHARD_BYTES) -> Self:
        """Begin to save the next version of a name. What was left of former saves under it, and has certainly ended, is removed.

        Args:
            root: Where.
            name: The snapshot's.
            resume: Not possible here.
            stripe_bytes: Of the stripes.
            shard_bytes: Of the largest object.

        Raises:
            InvalidArgument: It is no name, a size is wrong, or a save is to be resumed.
            BackendUnavailable: The store would not keep two savers apart.
            PermissionRefused: The credentials do not allow it.
            TransferFailed: The store does not answer as it should.
        """
        check_name(name)
        check_sizes(stripe_bytes, shard_bytes)
        if resume:
            raise InvalidArgument(
                "a save to an object store is not resumed", hint="Save without --resume: what was left of the former one is removed."
            )
        bucket = root.bucket
        root.check_conditions()
        there = versions(bucket, name)
        swept = sweep(root, there)
        number, identifier = _claim(bucket, name, 1 + max([_last_in_directory(bucket, name), *(version.number for version in there)]))
        plan = StagingPlan(FORMAT, name, number, identifier, ((root.id, 1.0),), stripe_bytes, shard_bytes)
        staging = cls(bucket, ObjectTarget(plan, bucket.url_of(f"{name}/{number}")), swept)
        try:
            bucket.write(f"{name}/{number}/{PART}", write(Part(FORMAT, name, number, identifier, root.id)))
            bucket.create(f"{name}/{LOCK}", b"")  # a directory that this prefix is copied to knows a name by it
        except BaseException as error:
            staging.fail(error)
            raise
        return staging

    @property
    def reference(self) -> Reference:
        """Name and version of what is being saved."""
        return Reference(self.target.plan.name, self.target.plan.version)

    def commit(self, images: Sequence[Image]) -> Manifest:
        """Make a snapshot of images whose objects are complete.

        Args:
            images: In the order of the devices.

        Returns:
            The manifest, once the snapshot is there for good.

        Raises:
            SnapshotBusy: Somebody has removed the version meanwhile.
            SnapshotDamaged: The images contradict themselves, or an object is not as it should be: it would be no good snapshot.
            GmsError: The store does not answer as it should. Whatever is raised, there is no snapshot once `fail` was called, unless that says so.
        """
        plan = self.target.plan
        manifest = Manifest(FORMAT, plan.name, plan.version, plan.id, now(), __version__, tuple(images))
        text = encode(manifest)
        decode(text, f"the manifest of {self.reference}")  # what would be refused when it is read is not written
        self._check_objects(manifest)
        if self._bucket.create(self._key(MANIFEST), text) is not None:
            raise SnapshotDamaged(f"{self._url(MANIFEST)} is there already, and not this save's", hint="Save anew; nothing of gms makes it.")
        self._seal = seal = write(Committed(FORMAT, plan.id, xxhash.xxh3_64_hexdigest(text)))
        try:
            there = self._bucket.create(self._key(COMMITTED), seal)
        except BaseException as error:
            found = self._settle(error)
            if found is None:
                raise
            there = None if found == seal else found
        self._seal = None
        if there is not None:
            raise self._given_up(there)
        self._ended = True
        log.info("snapshot %s is saved: %d bytes", self.reference, manifest.size)
        return manifest

    def fail(self, error: BaseException) -> None:
        """Write down why there will be no snapshot, until the next save under the name. Never raises."""
        if self._ended:
            return
        self._ended = True
        if (seal := self._seal) is not None:
            found = self._settle(error)
            if found == seal:
                log.warning("snapshot %s is there, though its save has ended with an error: %s", self.reference, str(error))
                if isinstance(error, GmsError):
                    error.add_hint(f"{self.reference} is there all the same.")
            if found == seal or self._seal is not None:
                return
        try:
            self._bucket.write(self._key(FAILED), write(failure(error, now())))
        except GmsError as untold:
            log.warning("why snapshot %s was not saved cannot be written down: %s", self.reference, str(untold))

    def close(self) -> None:
        """End it. Idempotent."""
        self._ended = True

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

    def _settle(self, error: BaseException) -> bytes | None:
        """Find out what became of a commit that was not answered.

        If it was not made, it never will be: the same condition decides as for anybody else, since what others may have seen is not taken back.

        Returns:
            What ``COMMITTED`` holds, if it was there; None if there will be no snapshot, or if that cannot be told: the error has a hint then.
        """
        gone = Removed(FORMAT, self.target.plan.id, now(), socket.gethostname(), "the save has failed while it was committed")
        try:
            there = self._bucket.create(self._key(COMMITTED), write(gone))
        except GmsError as untold:
            self._ended = True  # neither a snapshot nor a failure, as long as nobody knows
            log.warning("whether snapshot %s was committed cannot be told: %s", self.reference, str(untold))
            if isinstance(error, GmsError):
                error.add_hint(f"Whether {self.reference} is there is not known: look with gms snapshot list once the store answers.")
            return None
        self._seal = None
        return there

    def _key(self, name: str) -> str:
        return f"{self.target.plan.name}/{self.target.plan.version}/{name}"

    def _url(self, name: str) -> str:
        return self._bucket.url_of(self._key(name))

    def _given_up(self, there: bytes) -> GmsError:
        """Why somebody else has decided about this version."""
        found = verdict(there, self._url(COMMITTED))
        who = f" at {found.removed_at}, by {found.host}: {found.reason}" if isinstance(found, Removed) else ""
        return SnapshotBusy(
            f"{self.reference} was given up while it was saved{who}",
            hint="Save anew; prune with --incomplete, or by a version, only when nobody saves it any more.",
        )

    def _check_objects(self, manifest: Manifest) -> None:
        """Raise `SnapshotDamaged` unless the version has the objects of all images, and no others; `SnapshotBusy` if somebody has removed them."""
        wanted = {shard.path: shard.size for image in manifest.images for shard in image.shards}
        if len(wanted) != sum(len(image.shards) for image in manifest.images):
            raise SnapshotDamaged(f"two images of {self.reference} have the same object", hint="Save each image under an index of its own.")
        found = {f"{IMAGES}/{key}": one.size for key, one in self._bucket.objects(self._key(IMAGES)).items()}
        for path in sorted(wanted.keys() | found.keys()):
            if wanted.get(path) != found.get(path):
                if self._bucket.has(self._key(COMMITTED)):
                    raise self._given_up(self._bucket.read(self._key(COMMITTED)))
                raise SnapshotDamaged(
                    f"{self._url(path)} has {found.get(path, 'no')} bytes where the images have {wanted.get(path, 'none')}",
                    hint="Something else has changed the objects of this version: save anew.",
                )


def _claim(bucket: Bucket, name: str, number: int) -> tuple[int, str]:
    """Make a number one's own: the first one that nobody has. Returns it, and the snapshot's id.

    Raises:
        SnapshotBusy: Others were quicker, again and again.
    """
    identifier = secrets.token_hex(8)
    for tried in range(number, number + _TRIES):
        claim = Claim(FORMAT, name, tried, identifier, now(), __version__, this_process())
        key, mine = f"{name}/{tried}/{CLAIM}", write(claim)
        if bucket.create(key, mine) is not None or bucket.objects(f"{name}/{tried}").keys() != {CLAIM}:
            continue
        with contextlib.suppress(SnapshotNotFound):
            if bucket.read(key) == mine:  # else the store has let another one replace it
                return tried, identifier
    raise SnapshotBusy(f"others save snapshots {name!r} in {bucket.url} all the time", hint="Try again.")


def _last_in_directory(bucket: Bucket, name: str) -> int:
    """The highest version that was begun in a directory of which this prefix is a copy; 0 if it is none."""
    if not bucket.has(f"{name}/{LOCK}"):
        return 0
    text = bucket.read(f"{name}/{LOCK}").strip()
    return int(text) if text.isdigit() and len(text) < 19 else 0
