"""What snapshots there are in an object store, which of them a user means, and one of them, open for reading."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from gms_core.errors import GmsError, SnapshotBusy, SnapshotDamaged, SnapshotError, SnapshotMismatch, SnapshotNotFound
from gms_core.snapshot.catalogue import Entry
from gms_core.snapshot.manifest import Image, Manifest, check_relative
from gms_core.snapshot.objects.bucket import Bucket, Found
from gms_core.snapshot.objects.records import Removed, verdict
from gms_core.snapshot.objects.root import ObjectRoot
from gms_core.snapshot.objects.versions import Version, standing, utc_now, versions
from gms_core.snapshot.on_disk import COMMITTED, FAILED, MANIFEST, Committed, Reference, is_name, reference
from gms_core.snapshot.reading import checked_manifest, image_of
from gms_core.snapshot.transfer import File

log = logging.getLogger(__name__)


class ObjectSnapshot:
    """A snapshot in an object store. See `OpenSnapshot`: nothing there keeps others from removing it meanwhile, and it is an error then.

    Attributes:
        manifest: What it says of itself.
        objects: True.

    Args:
        bucket: The root.
        wanted: Its name and its version.
        seal: What was committed.
        listed: Its objects, by their names within it.
    """

    objects = True

    def __init__(self, bucket: Bucket, wanted: Reference, seal: Committed, listed: Mapping[str, Found]) -> None:
        self._bucket, self._wanted, self._listed = bucket, wanted, listed
        self._folder = f"{wanted.name}/{wanted.version}"
        key = f"{self._folder}/{MANIFEST}"
        try:
            text = bucket.read(key)
        except SnapshotNotFound:
            if MANIFEST in listed:
                raise SnapshotBusy(f"{bucket.url_of(self._folder)} was removed just now", hint="Restore another version.") from None
            raise SnapshotDamaged(f"{bucket.url_of(key)} is not there", hint="Restore another version, and save this one anew.") from None
        self.manifest: Manifest = checked_manifest(wanted, seal, text, bucket.url_of(key))

    @property
    def reference(self) -> Reference:
        """See `OpenSnapshot.reference`."""
        return self._wanted

    def image(self, index: int) -> Image:
        """See `OpenSnapshot.image`."""
        return image_of(self.manifest, index)

    def files(self, index: int) -> list[File]:
        """See `OpenSnapshot.files`. Whichever roots the manifest names: a snapshot that was striped over directories may be copied to one prefix."""
        files = []
        for shard in self.image(index).shards:
            url = self._bucket.url_of(f"{self._folder}/{shard.path}")
            found = self._listed.get(shard.path)
            if reason := check_relative(shard.path):
                raise SnapshotDamaged(f"{self._bucket.url_of(self._folder)}/{MANIFEST}: {reason}", hint="Save the snapshot anew.")
            if found is None:
                raise SnapshotNotFound(f"{url} is not there", hint="Restore another version, and save this one anew.")
            if found.size != shard.size:
                raise SnapshotDamaged(
                    f"{url} has {found.size} bytes, and {shard.size} were saved", hint="Restore another version, and save this one anew."
                )
            files.append(File(url, shard.root, shard.size))
        return files

    def close(self) -> None:
        """See `OpenSnapshot.close`. There is nothing to give up."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def entries(root: ObjectRoot, name: str = "") -> list[Entry]:
    """All snapshots in a root, and what has become of saves that did not become one; by name, the oldest version first.

    Args:
        root: Where to look.
        name: The only name that is looked for; empty for all.
    """
    names = [name] if name else [folder for folder in root.bucket.folders() if is_name(folder)]
    found = [_entry(root.bucket, version) for one in names for version in versions(root.bucket, one)]
    return [entry for entry in found if entry is not None]


def _entry(bucket: Bucket, version: Version) -> Entry | None:
    where = bucket.url_of(version.folder)
    if COMMITTED in version.objects and not version.is_trace and FAILED not in version.objects:
        try:
            with open_version(bucket, version) as snapshot:
                manifest = snapshot.manifest
        except SnapshotBusy:
            return None
        except SnapshotError as error:
            return Entry(version.name, version.number, "damaged", where, reason=str(error))
        found = (manifest.id, manifest.saved_at, manifest.writer, len(manifest.images), manifest.size)
        return Entry(version.name, version.number, "committed", where, *found)
    stands = standing(bucket, version, utc_now())
    if stands.state == "removed":
        return None
    return Entry(version.name, version.number, stands.state, where, stands.id, stands.at, reason=stands.reason)


def open_version(bucket: Bucket, version: Version) -> ObjectSnapshot:
    """Open a version that has ``COMMITTED``.

    Raises:
        SnapshotBusy: It was removed.
        SnapshotDamaged: Its manifest is not what was saved.
        SnapshotMismatch: It is of another version of the format.
    """
    key = f"{version.folder}/{COMMITTED}"
    seal = verdict(bucket.read(key), bucket.url_of(key))
    if isinstance(seal, Removed):
        raise SnapshotBusy(f"{bucket.url_of(version.folder)} was removed", hint="Restore another version.")
    return ObjectSnapshot(bucket, Reference(version.name, version.number), seal, version.objects)


def find(root: ObjectRoot, wanted: str) -> ObjectSnapshot:
    """Open a snapshot for reading.

    Args:
        root: Where it lies.
        wanted: ``NAME@VERSION``, or ``NAME`` for the newest version.

    Raises:
        InvalidArgument: That is no such text.
        SnapshotNotFound: There is none.
        SnapshotDamaged: Its manifest is not what was saved.
        SnapshotMismatch: It is of another version of the format.
        SnapshotBusy: It was removed just now.
    """
    asked = reference(wanted)
    bucket, there = root.bucket, versions(root.bucket, asked.name, asked.version)
    usable = [version for version in there if COMMITTED in version.objects and not version.is_trace]
    passed_over = [version for version in there if COMMITTED not in version.objects]
    for version in reversed(usable):
        try:
            snapshot = open_version(bucket, version)
        except SnapshotBusy:
            continue  # of a removal that did not end, or has ended just now
        except (SnapshotDamaged, SnapshotMismatch) as error:
            others = [f"{one.name}@{one.number}" for one in usable if one is not version]
            if others:
                error.add_hint(f"There is also {', '.join(others[-3:])}.")
            raise
        for newer in passed_over:
            if newer.number > version.number:
                with contextlib.suppress(GmsError):  # it is told for people, and nothing depends on it
                    stands = standing(bucket, newer, utc_now())
                    log.warning("%s@%d in %s is not used: %s", newer.name, newer.number, bucket.url, stands.reason)
        return snapshot
    raise _not_found(root, asked, passed_over)


def _not_found(root: ObjectRoot, asked: Reference, unfinished: list[Version]) -> SnapshotNotFound:
    if unfinished:
        version = unfinished[-1]
        stands = standing(root.bucket, version, utc_now())
        what = f"{version.name}@{version.number} at {root.bucket.url_of(version.folder)} is no snapshot (yet): {stands.reason}"
        return SnapshotNotFound(what, hint="gms snapshot list shows what can be restored.")
    there = versions(root.bucket, asked.name) if asked.version else []
    versions_there = [str(one.number) for one in there if standing(root.bucket, one, utc_now()).state == "committed"]
    hint = f"Its versions are: {', '.join(versions_there)}." if versions_there else "gms snapshot list shows what there is."
    return SnapshotNotFound(f"there is no snapshot {asked} in {root.bucket.url}", hint=hint)
