"""Names, and contents, of what snapshots are made of on disks, apart from shards and the manifest. Pure data.

A root has::

    gms-root                        the root's id
    NAME/lock                       locked by whoever saves or prunes under that name; the highest version that was ever begun
    NAME/.staging-VERSION-ID/       a save that goes on, or has ended without a snapshot
    NAME/.removing-VERSION-ID/      a snapshot that is being removed
    NAME/VERSION/                   a snapshot, or the part of one that begins in another root

A snapshot's folder has, in every root, ``part.json`` and ``images/K/*.shard``; in its first root ``manifest.json`` and, last of all, ``COMMITTED``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from gms_core.errors import GmsError, InvalidArgument, SnapshotDamaged, SnapshotMismatch
from gms_core.snapshot.manifest import FORMAT, Shard, Stripe

ROOT_FILE = "gms-root"
LOCK = "lock"
PLAN = "plan.json"
PART = "part.json"
FAILED = "FAILED"
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
IMAGES = "images"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_UNFINISHED = re.compile(r"\.(staging|removing)-([1-9][0-9]{0,17})-([0-9a-f]{16})")

Record = TypeVar("Record", bound=msgspec.Struct)


class Reference(NamedTuple):
    """What a user calls a snapshot.

    Attributes:
        name: Its name.
        version: Its version; 0 for the newest.
    """

    name: str
    version: int = 0

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``part.json``: to what a folder belongs, so that a root by itself tells whether another one is missing.

    Attributes:
        format: `FORMAT`.
        name: The snapshot's name.
        version: Its version.
        id: Its id.
        first: ``root_id`` of the root that has, or will have, the manifest.
    """

    format: str
    name: str
    version: int
    id: str
    first: str


class Committed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``COMMITTED``: only with it the snapshot exists.

    Attributes:
        format: `FORMAT`.
        id: The snapshot's id.
        manifest: xxh3_64 of ``manifest.json``, as 16 hexadecimal digits.
    """

    format: str
    id: str
    manifest: str


class Failure(msgspec.Struct, frozen=True):
    """``FAILED``: why a save has ended without a snapshot.

    Attributes:
        code: Of the error.
        message: Of the error.
        hint: Of the error.
        at: When, as RFC 3339 in UTC.
    """

    code: str
    message: str
    hint: str = ""
    at: str = ""


def failure(error: BaseException, at: str) -> Failure:
    """What is written down of an error.

    Args:
        error: Why something has failed.
        at: When, as RFC 3339 in UTC.
    """
    if isinstance(error, GmsError):
        return Failure(error.code, error.message, error.hint, at)
    words = "it was interrupted from the keyboard" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    return Failure("error", words, at=at)


class StagingPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``plan.json``: over what a save is laid out, so that it can be resumed.

    Attributes:
        format: `FORMAT`.
        name: The snapshot's name.
        version: Its version.
        id: Its id.
        roots: ``root_id`` and weight of each root, the first one first.
        stripe_bytes: Of the stripes.
        shard_bytes: Of the largest shard.
    """

    format: str
    name: str
    version: int
    id: str
    roots: tuple[tuple[str, float], ...]
    stripe_bytes: int
    shard_bytes: int


class ImagePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``plan-K.json``: what the files of an image were made for. Only a save of exactly that may go on with them.

    Attributes:
        format: `FORMAT`.
        digest: Of the layout.
        block_bytes: Bytes under one checksum.
        shards: The image's files.
        stripes: What lies where in them.
    """

    format: str
    digest: str
    block_bytes: int
    shards: tuple[Shard, ...]
    stripes: tuple[Stripe, ...]


class Unfinished(NamedTuple):
    """What the name of a folder says of what goes on in it, or has ended there.

    Attributes:
        kind: ``staging`` or ``removing``.
        version: The snapshot's version.
        id: Its id.
    """

    kind: str
    version: int
    id: str

    @property
    def folder(self) -> str:
        """The folder's name."""
        return f".{self.kind}-{self.version}-{self.id}"


class _Format(msgspec.Struct, frozen=True):
    format: str


def reference(text: str) -> Reference:
    """Understand ``NAME`` or ``NAME@VERSION``.

    Raises:
        InvalidArgument: It is neither.
    """
    name, at, version = text.partition("@")
    check_name(name)
    if at and _VERSION.fullmatch(version) is None:
        raise InvalidArgument(f"{version!r} is no version of a snapshot", hint="Write NAME@VERSION with a number from 1, or NAME for the newest one.")
    return Reference(name, int(version) if at else 0)


def check_name(name: str) -> None:
    """Raise `InvalidArgument` for what cannot be the name of a snapshot."""
    if _NAME.fullmatch(name) is None or name == ROOT_FILE:
        raise InvalidArgument(
            f"{name[:70]!r} is not a name of a snapshot", hint="Use up to 64 letters, digits, '.', '_' and '-', and begin with a letter or a digit."
        )


def is_name(folder: str) -> bool:
    """Whether a folder of a root can be that of a name."""
    return _NAME.fullmatch(folder) is not None


def version_of(folder: str) -> int:
    """The version whose folder has this name; 0 if it is none."""
    return int(folder) if _VERSION.fullmatch(folder) else 0


def unfinished(folder: str) -> Unfinished | None:
    """What a folder's name says, if something goes on in it or has ended there."""
    found = _UNFINISHED.fullmatch(folder)
    return Unfinished(found[1], int(found[2]), found[3]) if found else None


def image_plan(index: int) -> str:
    """Name of the file with the `ImagePlan` of an image."""
    return f"plan-{index}.json"


def image_folder(index: int) -> str:
    """The folder of an image's shards, relative to the snapshot's folder."""
    return f"{IMAGES}/{index}"


def write(record: msgspec.Struct) -> bytes:
    """A record as JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def read(text: bytes, kind: type[Record], where: Path | str) -> Record:
    """Read a record that names its format.

    Raises:
        SnapshotMismatch: It is of another version of the format.
        SnapshotDamaged: It is no such record.
    """
    try:
        found = msgspec.json.decode(text, type=_Format).format
        if found != FORMAT:
            raise SnapshotMismatch(
                f"{where} is of the format {found!r}, not {FORMAT!r}", hint="Use the version of GMS that has written it, or save the snapshot anew."
            )
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotDamaged(f"{where} cannot be understood: {error}", hint="Restore another version, and save this one anew.") from error
