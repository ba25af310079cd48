"""The versions of a name in an object store, as one listing shows them, and how each stands."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from gms_core.errors import SnapshotError
from gms_core.snapshot.objects.bucket import Bucket, Found
from gms_core.snapshot.objects.records import CLAIM, Claim, Removed, verdict
from gms_core.snapshot.objects.savers import has_ended, is_alive
from gms_core.snapshot.on_disk import COMMITTED, FAILED, MANIFEST, Committed, Failure, read, version_of

IDLE_S = 24 * 3600.0
"""Seconds without a new object after which a save on another machine is taken for one that has ended, in lists and by a removal."""

State = Literal["committed", "damaged", "failed", "saving", "unfinished", "removed"]


class Version(NamedTuple):
    """What a listing shows of a version.

    Attributes:
        name: Of the snapshot.
        number: The version.
        objects: By their names within it.
    """

    name: str
    number: int
    objects: Mapping[str, Found]

    @property
    def folder(self) -> str:
        """What the names of its objects begin with, in the root."""
        return f"{self.name}/{self.number}"

    @property
    def is_trace(self) -> bool:
        """Whether nothing is left of it but that it is no snapshot."""
        return self.objects.keys() == {COMMITTED}

    @property
    def newest(self) -> dt.datetime:
        """When the last of its objects was made, by the store's clock."""
        return max(found.modified for found in self.objects.values())


class Standing(NamedTuple):
    """How a version stands.

    Attributes:
        state: Of it.
        ended: Whether it is certain that nobody saves it any more.
        reason: Why it is no snapshot.
        id: The snapshot's; empty if that is not known.
        at: When it was begun, or has failed; empty if that is not known.
    """

    state: State
    ended: bool
    reason: str = ""
    id: str = ""
    at: str = ""


def versions(bucket: Bucket, name: str, number: int = 0) -> list[Version]:
    """What there is of a name, the oldest version first.

    Args:
        bucket: The root.
        name: Of snapshots.
        number: The only version that is wanted; 0 for all.
    """
    if number:
        objects = bucket.objects(f"{name}/{number}")
        return [Version(name, number, objects)] if objects else []
    found: dict[int, dict[str, Found]] = {}
    for key, one in bucket.objects(name).items():
        first, slash, rest = key.partition("/")
        if slash and rest and (version := version_of(first)):
            found.setdefault(version, {})[rest] = one
    return [Version(name, version, objects) for version, objects in sorted(found.items())]


def standing(bucket: Bucket, version: Version, now: dt.datetime) -> Standing:
    """How a version stands. The manifest of one that is committed is not read.

    Args:
        bucket: The root.
        version: As it was listed.
        now: The time, to say how long nothing was written.

    Raises:
        PermissionRefused: The credentials do not allow it.
        TransferFailed: The store does not answer as it should.
    """
    if version.is_trace:
        return Standing("removed", ended=True)
    if COMMITTED in version.objects:
        key = f"{version.folder}/{COMMITTED}"
        try:
            found = verdict(bucket.read(key), bucket.url_of(key))
        except SnapshotError as error:
            return Standing("damaged", ended=True, reason=str(error))
        if isinstance(found, Removed) and FAILED not in version.objects:
            return Standing("removed", ended=True, reason=found.reason, id=found.id, at=found.removed_at)
        if isinstance(found, Committed):
            if MANIFEST in version.objects:
                return Standing("committed", ended=True, id=found.id)
            return Standing("damaged", ended=True, reason=f"{bucket.url_of(version.folder)}/{MANIFEST} is not there", id=found.id)
    claim = claim_of(bucket, version)
    identifier, at = (claim.id, claim.at) if claim is not None else ("", "")
    if FAILED in version.objects:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, SnapshotError):
            failure = msgspec.json.decode(bucket.read(f"{version.folder}/{FAILED}"), type=Failure)
            return Standing("failed", True, f"{failure.message}. {failure.hint}" if failure.hint else failure.message, identifier, failure.at)
    if claim is not None and is_alive(claim.saver):
        return Standing("saving", False, "it is being saved", identifier, at)
    if claim is not None and has_ended(claim.saver):
        return Standing("unfinished", True, "whoever saved it was ended before it was whole", identifier, at)
    idle = (now - version.newest).total_seconds()
    begun = f"{claim.saver.host} has begun it at {claim.at}" if claim is not None else "it says not who has begun it"
    known = f"{begun}, and its last object is of {version.newest:%Y-%m-%dT%H:%M:%SZ}"
    if idle < IDLE_S:
        return Standing("saving", False, f"{known}; whether that goes on cannot be seen from here", identifier, at)
    return Standing("unfinished", False, f"{known}: it is taken for one that has ended", identifier, at)


def claim_of(bucket: Bucket, version: Version) -> Claim | None:
    """Whose a version is; None if nothing says it that can be understood."""
    if CLAIM not in version.objects:
        return None
    key = f"{version.folder}/{CLAIM}"
    try:
        return read(bucket.read(key), Claim, bucket.url_of(key))
    except SnapshotError:
        return None


def utc_now() -> dt.datetime:
    """The time of this machine."""
    return dt.datetime.now(dt.UTC)
