"""Where snapshots lie, as commands see it: some directories, or one place in an object store. What can be done is the same, how it is done is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from gms_core.errors import InvalidArgument
from gms_core.snapshot import catalogue, pruning
from gms_core.snapshot.catalogue import Entry
from gms_core.snapshot.manifest import Image, Manifest
from gms_core.snapshot.objects import catalogue as object_catalogue
from gms_core.snapshot.objects import pruning as object_pruning
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.root import ObjectRoot, open_root
from gms_core.snapshot.objects.staging import ObjectStaging
from gms_core.snapshot.objects.target import ObjectTarget
from gms_core.snapshot.objects.urls import root_url
from gms_core.snapshot.on_disk import Reference
from gms_core.snapshot.pruning import Pruned
from gms_core.snapshot.reading import OpenSnapshot
from gms_core.snapshot.roots import Root, open_roots
from gms_core.snapshot.staging import Staging, Target
from gms_core.snapshot.transfer import Where


class Save(Protocol):
    """A save that goes on. It ends by `commit`, or without a snapshot; as a context manager it tells there why, if an error ended it."""

    @property
    def target(self) -> Target | ObjectTarget:
        """For those who save its images."""

    @property
    def swept(self) -> tuple[str, ...]:
        """What was removed of former saves when it began."""

    @property
    def locks(self) -> tuple[int, ...]:
        """Descriptors that a process which writes for this save has too, so that nobody takes up its files while it is there."""

    @property
    def reference(self) -> Reference:
        """Name and version of what is being saved."""

    def commit(self, images: Sequence[Image]) -> Manifest:
        """Make a snapshot of images, in the order of the devices. Whatever is raised, there is no snapshot once `fail` was called.

        Raises:
            SnapshotDamaged: The images contradict themselves, or a file is not as it should be.
            GmsError: It cannot be written down.
        """

    def fail(self, error: BaseException) -> None:
        """Write down why there will be no snapshot. Never raises."""

    def close(self) -> None:
        """Let others save under the name. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Shelf(Protocol):
    """Where snapshots lie."""

    @property
    def roots(self) -> tuple[Where, ...]:
        """What a user calls it."""

    def entries(self, name: str = "") -> list[Entry]:
        """All snapshots, or those of a name, and saves that did not become one; by name, the oldest version first."""

    def find(self, wanted: str) -> OpenSnapshot:
        """Open ``NAME@VERSION``, or the newest version of ``NAME``, for reading.

        Raises:
            SnapshotNotFound: There is none, or a part of it is missing.
            SnapshotDamaged: Its manifest is not what was saved.
            GmsError: It cannot be read.
        """

    def begin(self, name: str, *, resume: bool, stripe_bytes: int, shard_bytes: int) -> Save:
        """Begin to save the next version of a name. What was left of former saves under it is removed, as far as nobody goes on with them.

        Raises:
            InvalidArgument: It is no name, or a size is wrong, or it cannot be resumed.
            GmsError: It cannot be written there.
        """

    def prune(self, name: str, *, keep: int | None = None, version: int = 0, incomplete: bool = False) -> Pruned:
        """Remove snapshots of a name, and what was left of saves. See `gms_core.snapshot.pruning.prune`."""


@dataclass(frozen=True, slots=True)
class Directories:
    """A shelf of one or several directories, over which each image is striped."""

    opened: tuple[Root, ...]

    @property
    def roots(self) -> tuple[Where, ...]:
        """See `Shelf.roots`."""
        return tuple(root.path for root in self.opened)

    def entries(self, name: str = "") -> list[Entry]:
        """See `Shelf.entries`."""
        return catalogue.entries(self.opened, name)

    def find(self, wanted: str) -> OpenSnapshot:
        """See `Shelf.find`."""
        return catalogue.find(self.opened, wanted)

    def begin(self, name: str, *, resume: bool, stripe_bytes: int, shard_bytes: int) -> Save:
        """See `Shelf.begin`."""
        return Staging.begin(self.opened, name, resume=resume, stripe_bytes=stripe_bytes, shard_bytes=shard_bytes)

    def prune(self, name: str, *, keep: int | None = None, version: int = 0, incomplete: bool = False) -> Pruned:
        """See `Shelf.prune`."""
        return pruning.prune(self.opened, name, keep=keep, version=version, incomplete=incomplete)


@dataclass(frozen=True, slots=True)
class Objects:
    """A shelf in an object store."""

    root: ObjectRoot

    @property
    def roots(self) -> tuple[Where, ...]:
        """See `Shelf.roots`."""
        return (self.root.bucket.url,)

    def entries(self, name: str = "") -> list[Entry]:
        """See `Shelf.entries`."""
        return object_catalogue.entries(self.root, name)

    def find(self, wanted: str) -> OpenSnapshot:
        """See `Shelf.find`."""
        return object_catalogue.find(self.root, wanted)

    def begin(self, name: str, *, resume: bool, stripe_bytes: int, shard_bytes: int) -> Save:
        """See `Shelf.begin`."""
        return ObjectStaging.begin(self.root, name, resume=resume, stripe_bytes=stripe_bytes, shard_bytes=shard_bytes)

    def prune(self, name: str, *, keep: int | None = None, version: int = 0, incomplete: bool = False) -> Pruned:
        """See `Shelf.prune`."""
        return object_pruning.prune(self.root, name, keep=keep, version=version, incomplete=incomplete)


def open_shelf(roots: Sequence[Where], *, create: bool = False) -> Shelf:
    """Find out what lies where a user says.

    Args:
        roots: Directories, or the one URL of a place in an object store.
        create: Make it fit for snapshots if it is not yet: directories are made, buckets are not.

    Raises:
        InvalidArgument: There is none, one is named twice, or a URL is not alone.
        SnapshotNotFound: It is not there, or there never was a snapshot.
        BackendUnavailable: It is an object store, and the library for those is not installed.
        PermissionRefused: This user, or its credentials, may not use it.
    """
    urls = [root for root in roots if isinstance(root, str)]
    if not urls:
        return Directories(open_roots([Path(root) for root in roots], create=create))
    if len(roots) > 1:
        raise InvalidArgument(
            f"{urls[0]} is given beside other roots", hint="A root in an object store is the only one: the store spreads what it gets over its disks."
        )
    return Objects(open_root(Bucket(root_url(urls[0])), create=create))
