"""What an object store has beside what directories have, and what decides there. Pure data.

A version has the same names as in a directory, and ``claim.json``. Two of its objects are made by one alone, since the store makes an object only if
there is none of its name: ``claim.json`` says whose the number is, and ``COMMITTED`` says what has become of it. The saver makes the latter with the
checksum of the manifest; whoever removes a version that was not committed makes it first, with the reason, and the saver can commit no more. A
snapshot that is removed has its ``COMMITTED`` replaced so. It is never deleted: so a number never comes twice.
"""

from __future__ import annotations

import datetime as dt

import msgspec

from gms_core.snapshot.objects.savers import Saver
from gms_core.snapshot.on_disk import Committed, read
from gms_core.snapshot.transfer import Where

CLAIM = "claim.json"


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``claim.json``: whose version it is.

    Attributes:
        format: `FORMAT`.
        name: The snapshot's name.
        version: Its version.
        id: Its id.
        at: When it was begun, as RFC 3339 in UTC.
        writer: The version of GMS.
        saver: Who saves.
    """

    format: str
    name: str
    version: int
    id: str
    at: str
    writer: str
    saver: Saver


class Removed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``COMMITTED`` of a version that is no snapshot, and will never be one.

    Attributes:
        format: `FORMAT`.
        id: The snapshot's; empty if that was not known.
        removed_at: When, as RFC 3339 in UTC.
        host: The machine that has removed it.
        reason: Why.
    """

    format: str
    id: str
    removed_at: str
    host: str
    reason: str


class _Verdict(msgspec.Struct, frozen=True):
    removed_at: str = ""


def verdict(text: bytes, where: Where) -> Committed | Removed:
    """What ``COMMITTED`` says.

    Raises:
        SnapshotMismatch: It is of another version of the format.
        SnapshotDamaged: It cannot be understood.
    """
    try:
        removed = msgspec.json.decode(text, type=_Verdict).removed_at
    except (msgspec.DecodeError, UnicodeDecodeError):
        removed = ""
    return read(text, Removed, where) if removed else read(text, Committed, where)


def now() -> str:
    """The time as RFC 3339 in UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
