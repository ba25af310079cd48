"""A snapshot that is open for reading: its manifest and its files, found to be what was saved as far as that shows without reading them."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Protocol, Self

import xxhash

from gms_core.errors import InvalidArgument, SnapshotBusy, SnapshotDamaged, SnapshotError, SnapshotNotFound
from gms_core.snapshot.folders import Folder, check_owner, explained
from gms_core.snapshot.locks import lock_for_reading
from gms_core.snapshot.manifest import Image, Manifest, Shard, check_relative, decode
from gms_core.snapshot.objects.records import Removed, verdict
from gms_core.snapshot.on_disk import COMMITTED, MANIFEST, PART, Committed, Part, Reference, read
from gms_core.snapshot.roots import Root
from gms_core.snapshot.transfer import File, Where

log = logging.getLogger(__name__)


def part_of(inside: Folder) -> Part | None:
    """What a snapshot's folder says of where it belongs; None if it says nothing that can be understood.

    Raises:
        TransferFailed: It could not be read: what it says is not known.
    """
    try:
        return read(inside.read(PART), Part, inside.path / PART)
    except SnapshotError as error:
        log.debug("%s", error)
        return None


def is_trace(inside: Folder) -> bool:
    """Whether a folder with ``COMMITTED`` is what an object store keeps of a version that was removed, of which this is a copy."""
    if inside.has(MANIFEST) or inside.has(PART):
        return False
    try:
        return isinstance(verdict(inside.read(COMMITTED), inside.path / COMMITTED), Removed)
    except SnapshotError:
        return False


def read_manifest(wanted: Reference, inside: Folder) -> Manifest:
    """Read a snapshot's manifest, if it is the one that was committed there."""
    path = inside.path / MANIFEST
    seal = read(inside.read(COMMITTED), Committed, inside.path / COMMITTED)
    return checked_manifest(wanted, seal, inside.read(MANIFEST), path)


def checked_manifest(wanted: Reference, seal: Committed, text: bytes, where: Where) -> Manifest:
    """A manifest, if it is the one that was committed.

    Args:
        wanted: The snapshot's name and version.
        seal: What was committed.
        text: Of the manifest.
        where: It comes from.

    Raises:
        SnapshotDamaged: It is another one, or contradicts itself.
        SnapshotMismatch: It is of another version of the format.
    """
    if xxhash.xxh3_64_hexdigest(text) != seal.manifest:
        raise SnapshotDamaged(f"{where} is not what was saved: its checksum differs", hint="Restore another version, and save this one anew.")
    manifest = decode(text, str(where))
    if (manifest.name, manifest.version, manifest.id) != (*wanted, seal.id):
        raise SnapshotDamaged(
            f"{where} is of the snapshot {manifest.name}@{manifest.version}, with the id {manifest.id}, and not of {wanted}",
            hint="Files were moved by hand: put them back.",
        )
    return manifest


class ImageSource(Protocol):
    """Whatever images come from."""

    objects: bool
    """Whether they lie in an object store."""

    def image(self, index: int) -> Image:
        """One of its images.

        Raises:
            InvalidArgument: It has no such image.
        """

    def files(self, index: int) -> list[File]:
        """Where the parts of an image are, by the numbers that stripes have. They are there, with the sizes that they should have.

        Raises:
            SnapshotNotFound: A root or a part is missing.
            SnapshotDamaged: A part has another size.
        """


class OpenSnapshot(ImageSource, Protocol):
    """A snapshot that is open for reading, wherever it lies."""

    manifest: Manifest
    """What it says of itself."""

    @property
    def reference(self) -> Reference:
        """Its name and its version."""

    def close(self) -> None:
        """Do not read it any more. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def image_of(manifest: Manifest, index: int) -> Image:
    """One of the images of a snapshot.

    Raises:
        InvalidArgument: It has no such image.
    """
    if not 0 <= index < len(manifest.images):
        raise InvalidArgument(f"snapshot {manifest.name}@{manifest.version} has no image {index}: it has {len(manifest.images)}")
    return manifest.images[index]


class Snapshot:
    """A snapshot in directories. See `OpenSnapshot`: nobody removes it until it is closed.

    Attributes:
        manifest: What it says of itself.
        objects: False.

    Args:
        roots: Where its parts are.
        wanted: Its name and its version.
        path: Its folder in its first root.
    """

    objects = False

    def __init__(self, roots: Sequence[Root], wanted: Reference, path: Path) -> None:
        self._roots = {root.id: root for root in roots}
        self._wanted = wanted
        with Folder.open(path.parent.parent) as top, top.child(wanted.name) as named, named.child(path.name) as inside:
            try:
                self._lock = lock_for_reading(inside, MANIFEST)
            except SnapshotNotFound as error:
                raise SnapshotDamaged(f"{path / MANIFEST} is not there", hint="Restore another version, and save this one anew.") from error
            try:
                self.manifest = read_manifest(wanted, inside)
            except SnapshotNotFound as error:
                self.close()
                raise SnapshotBusy(f"{path} was removed just now", hint="Restore another version.") from error
            except BaseException:
                self.close()
                raise

    @property
    def reference(self) -> Reference:
        """Its name and its version."""
        return self._wanted

    def image(self, index: int) -> Image:
        """See `OpenSnapshot.image`."""
        return image_of(self.manifest, index)

    def files(self, index: int) -> list[File]:
        """The files of an image, by the numbers that stripes have. They are there, with the sizes that they should have.

        Raises:
            SnapshotNotFound: A root or a file is missing.
            SnapshotDamaged: A file has another size, or a root has a part of another snapshot.
            PermissionRefused: A file is a link or no regular file, another user's, or everybody may write to it.
        """
        image = self.image(index)
        if missing := sorted({shard.root for shard in image.shards} - self._roots.keys()):
            raise SnapshotNotFound(
                f"snapshot {self._wanted} lies in {len({shard.root for shard in image.shards})} roots, and root {', '.join(missing)} was not given",
                hint="Give all of its roots with --root; each has its id in the file gms-root.",
            )
        with contextlib.ExitStack() as stack:
            inside = {root: self._part(self._roots[root], stack) for root in {shard.root for shard in image.shards}}
            return [_file(shard, inside[shard.root]) for shard in image.shards]

    def _part(self, root: Root, stack: contextlib.ExitStack) -> Folder:
        """The snapshot's folder in a root."""
        path = root.path / self._wanted.name / str(self._wanted.version)
        try:
            top = stack.enter_context(Folder.open(root.path))
            inside = stack.enter_context(stack.enter_context(top.child(self._wanted.name)).child(str(self._wanted.version)))
        except SnapshotNotFound as error:
            raise SnapshotNotFound(
                f"{path} is not there: root {root.id} has lost its part of snapshot {self._wanted}",
                hint="Restore another version, and save this one anew.",
            ) from error
        part = part_of(inside)
        if part is None or part.id != self.manifest.id:
            raise SnapshotDamaged(
                f"{path} is not a part of snapshot {self._wanted}, whose id is {self.manifest.id}",
                hint="The root was copied or restored from another state than the other roots: put the right one back, or save anew.",
            )
        return inside

    def close(self) -> None:
        """Let others remove it. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _file(shard: Shard, inside: Folder) -> File:
    """A shard's file, once it was found to be there as it should, with no link on the way."""
    if reason := check_relative(shard.path):
        raise SnapshotDamaged(f"{inside.path / MANIFEST}: {reason}", hint="Save the snapshot anew.")
    path = inside.path / shard.path
    *folders, name = PurePosixPath(shard.path).parts
    with contextlib.ExitStack() as stack:
        folder = inside
        for part in folders:
            folder = stack.enter_context(folder.child(part))
        try:
            with explained("looked at", path):
                found = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
        except SnapshotNotFound as error:
            raise SnapshotNotFound(f"{path} is not there", hint="Restore another version, and save this one anew.") from error
    if not stat.S_ISREG(found.st_mode):
        raise SnapshotDamaged(f"{path} is no regular file", hint="Restore another version, and save this one anew.")
    check_owner(found, path)
    if found.st_size != shard.size:
        raise SnapshotDamaged(
            f"{path} has {found.st_size} bytes, and {shard.size} were saved", hint="Restore another version, and save this one anew."
        )
    return File(path, shard.root, shard.size)
