"""A root in an object store: its id, and whether the store keeps two savers apart."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from gms_core.errors import BackendUnavailable, SnapshotDamaged, SnapshotNotFound
from gms_core.snapshot.objects.bucket import Bucket, explained
from gms_core.snapshot.objects.urls import locate
from gms_core.snapshot.on_disk import ROOT_FILE

_ID = re.compile(rb"[0-9a-f]{32}\n?")


@dataclass(frozen=True, slots=True)
class ObjectRoot:
    """A prefix of a bucket.

    Attributes:
        id: 32 hexadecimal digits, made once and never changed.
        bucket: Where it is.
    """

    id: str
    bucket: Bucket

    def check_conditions(self) -> None:
        """Raise `BackendUnavailable` unless the store makes an object only where there is none: nothing else keeps two savers apart.

        The object that it is asked to make again is the root's own, with what it holds: a store that does so changes nothing.
        """
        if not self.bucket.keeps_what_is_there(ROOT_FILE, _text(self.id)):
            raise BackendUnavailable(
                f"the store of {self.bucket.url} replaces objects that are to be made only where there are none (If-None-Match: *)",
                hint="Snapshots there can be restored, but two savers could not be kept apart: use a store, or a version of it, that refuses.",
            )


def open_root(bucket: Bucket, *, create: bool = False) -> ObjectRoot:
    """Find out which root a prefix is.

    Args:
        bucket: The prefix.
        create: Make it a root if it is none yet. The bucket has to be there.

    Raises:
        SnapshotNotFound: There is no such bucket, or the prefix is no root.
        PermissionRefused: The credentials do not allow it.
        SnapshotDamaged: Its id cannot be read.
    """
    (_make_directory if create else _check_directory)(bucket.url)
    try:
        text = bucket.read(ROOT_FILE)
    except SnapshotNotFound as error:
        if "bucket" in error.details:
            raise
        if not create:
            raise SnapshotNotFound(
                f"{bucket.url} is no root of snapshots: it has no object {ROOT_FILE}", hint="Name the URL that was given when the snapshot was saved."
            ) from None
        mine = _text(secrets.token_hex(16))
        text = bucket.create(ROOT_FILE, mine) or mine
    if _ID.fullmatch(text) is None:
        raise SnapshotDamaged(
            f"{bucket.url_of(ROOT_FILE)} holds no id of a root",
            hint="The manifests of its snapshots name the id: write it there, 32 hexadecimal digits.",
        )
    return ObjectRoot(text.decode().strip(), bucket)


def _text(identifier: str) -> bytes:
    return f"{identifier}\n".encode()


def _make_directory(url: str) -> None:
    """Make the directory of a root of files. Buckets are made by their owners alone."""
    base, key = locate(url)
    if base == "file://":
        path = Path("/", key)
        if not path.parent.is_dir():
            raise SnapshotNotFound(f"{path.parent} is not there", hint="Make it, if nothing was to be mounted there.")
        with explained("made", url):
            path.mkdir(mode=0o700, exist_ok=True)


def _check_directory(url: str) -> None:
    """Raise `SnapshotNotFound` if the root is one of files, and its directory is not there."""
    base, key = locate(url)
    if base == "file://" and not Path("/", key).is_dir():
        raise SnapshotNotFound(f"{url} is not there", hint="Name the root that was given when the snapshot was saved.")
