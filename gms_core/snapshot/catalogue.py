"""What snapshots there are in some roots, and which of them a user means."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from gms_core.errors import GmsError, InvalidArgument, SnapshotDamaged, SnapshotMismatch, SnapshotNotFound
from gms_core.snapshot.folders import Folder
from gms_core.snapshot.locks import is_locked
from gms_core.snapshot.on_disk import (
    COMMITTED,
    FAILED,
    LOCK,
    PLAN,
    Failure,
    Reference,
    is_name,
    reference,
    unfinished,
    version_of,
)
from gms_core.snapshot.reading import Snapshot, is_trace, part_of, read_manifest
from gms_core.snapshot.roots import Root
from gms_core.snapshot.transfer import Where

log = logging.getLogger(__name__)

State = Literal["committed", "damaged", "part", "saving", "failed", "unfinished"]
"""``part`` is in a root that is not the first one of its snapshot, which was not given; ``unfinished`` is a save that was killed. In an object store
``saving`` may also be one of which it is not known whether it goes on."""


class Entry(NamedTuple):
    """A line of the list of snapshots.

    Attributes:
        name: The snapshot's name.
        version: Its version.
        state: Only one that is ``committed`` can be restored.
        path: Its folder in its first root, or where there is a part of it; in an object store a URL.
        id: Its id; empty where that cannot be read.
        saved_at: When, as RFC 3339 in UTC; empty where that is not known.
        writer: The version of GMS that saved it.
        images: How many it has.
        size: Bytes of all images.
        reason: Why it is not ``committed``; the error's hint is in it.
    """

    name: str
    version: int
    state: State
    path: Where
    id: str = ""
    saved_at: str = ""
    writer: str = ""
    images: int = 0
    size: int = 0
    reason: str = ""


def entries(roots: Sequence[Root], name: str = "") -> list[Entry]:
    """All snapshots in some roots, and what has become of saves that did not become one; by name, the oldest version first.

    Args:
        roots: Where to look.
        name: The only name that is looked for; empty for all.
    """
    return _look(roots, name, _committed_entry)


def _look(roots: Sequence[Root], name: str, committed: Callable[[str, int, Folder], Entry]) -> list[Entry]:
    given = frozenset(root.id for root in roots)
    found = [entry for root in roots for folder in _names(root, name) for entry in _entries(folder, root, given, committed)]
    return sorted(found, key=lambda entry: (entry.name, entry.version, str(entry.path)))


def _names(root: Root, name: str) -> Iterator[Folder]:
    """The folders of names in a root. What else lies there, such as ``lost+found``, has no file `LOCK`.

    Raises:
        GmsError: That of the one name that is looked for cannot be used. When all are, it is left out.
    """
    with Folder.open(root.path) as top:
        for child in [name] if name else filter(is_name, top.names()):
            try:
                with top.child(child) as folder:
                    if folder.has(LOCK):
                        yield folder
            except SnapshotNotFound:
                continue
            except GmsError as error:
                if name:
                    raise
                log.warning("%s is left out: %s", root.path / child, error)


def _entries(folder: Folder, root: Root, given: frozenset[str], committed: Callable[[str, int, Folder], Entry]) -> Iterator[Entry]:
    saving = is_locked(folder)
    for child in folder.names():
        begun = unfinished(child)
        if version_of(child) or (begun is not None and begun.kind == "staging"):
            try:
                with folder.child(child) as inside:
                    name, version = folder.path.name, version_of(child)
                    whole = version and inside.has(COMMITTED)
                    if whole and is_trace(inside):
                        continue
                    if entry := committed(name, version, inside) if whole else _unfinished_entry(name, inside, root, given, saving):
                        yield entry
            except SnapshotNotFound:
                continue  # it was removed, or renamed, meanwhile
            except GmsError as error:
                if version := version_of(child):
                    yield Entry(folder.path.name, version, "damaged", folder.path / child, reason=str(error))


def _unfinished_entry(name: str, inside: Folder, root: Root, given: frozenset[str], saving: bool) -> Entry | None:
    """What a folder without `COMMITTED` says of itself; None if another root that was given says it."""
    version = version_of(inside.path.name)
    part = part_of(inside)
    if part is None or (part.first != root.id and part.first in given):
        return None
    if part.first != root.id:
        reason = f"its manifest is in root {part.first}, which was not given"
        return Entry(name, part.version, "part", inside.path, part.id, reason=reason)
    if inside.has(FAILED):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            failure = msgspec.json.decode(inside.read(FAILED), type=Failure)
            reason = f"{failure.message}. {failure.hint}" if failure.hint else failure.message
            return Entry(name, part.version, "failed", inside.path, part.id, failure.at, reason=reason)
    if not version and not inside.has(PLAN):
        return None
    if saving:
        return Entry(name, part.version, "saving", inside.path, part.id, reason="it is being saved")
    return Entry(name, part.version, "unfinished", inside.path, part.id, reason="whoever saved it was ended before it was whole")


def _committed_entry(name: str, version: int, inside: Folder) -> Entry:
    try:
        manifest = read_manifest(Reference(name, version), inside)
    except GmsError as error:
        return Entry(name, version, "damaged", inside.path, reason=str(error))
    return Entry(name, version, "committed", inside.path, manifest.id, manifest.saved_at, manifest.writer, len(manifest.images), manifest.size)


def find(roots: Sequence[Root], wanted: str) -> Snapshot:
    """Open a snapshot for reading: nobody removes it until it is closed.

    Args:
        roots: Where its parts are, in any order.
        wanted: ``NAME@VERSION``, or ``NAME`` for the newest version.

    Raises:
        InvalidArgument: That is no such text, or it is in two roots.
        SnapshotNotFound: There is none, or one of its roots or files is missing; or the root with the newest version's manifest, if none is named.
        SnapshotDamaged: Its manifest is not what was saved.
        SnapshotMismatch: It is of another version of the format.
        SnapshotBusy: It is being removed.
    """
    asked = reference(wanted)
    # Manifests of thousands of tensors take their time: only the one that is wanted is read.
    there = _look(roots, asked.name, lambda name, version, inside: Entry(name, version, "committed", inside.path))
    usable = [entry for entry in there if entry.state in ("committed", "damaged") and asked.version in (0, entry.version)]
    if not usable:
        raise _not_found(asked, there)
    of_it = [entry for entry in usable if entry.version == usable[-1].version]
    whole = [entry for entry in of_it if entry.state == "committed"]
    newest = whole[0] if whole else of_it[0]
    for entry in there:
        if not asked.version and entry.version > newest.version:
            if entry.state == "part" and version_of(Path(entry.path).name):
                raise SnapshotNotFound(
                    f"{entry.name}@{entry.version} is newer than all that are whole here, but {entry.reason}",
                    hint=f"Give that root too, with --root; or name {newest.name}@{newest.version} to have the older one.",
                )
            log.warning("%s@%d in %s is not used: %s", entry.name, entry.version, entry.path, entry.reason)
    if len(whole) > 1:
        raise InvalidArgument(
            f"{newest.name}@{newest.version} is at {' and at '.join(str(entry.path) for entry in whole)}",
            hint="Give the root of one of them alone with --root.",
        )
    try:
        return Snapshot(roots, Reference(newest.name, newest.version), Path(newest.path))
    except (SnapshotDamaged, SnapshotMismatch) as error:
        others = [f"{entry.name}@{entry.version}" for entry in there if entry.state == "committed" and entry.version != newest.version]
        if others:
            error.add_hint(f"There is also {', '.join(others[-3:])}.")
        raise


def _not_found(asked: Reference, there: Sequence[Entry]) -> SnapshotNotFound:
    for entry in there:
        if asked.version in (0, entry.version):
            what = f"{entry.name}@{entry.version} at {entry.path} is no snapshot (yet): {entry.reason}"
            hint = "Give that root too, with --root." if entry.state == "part" else "gms snapshot list shows what can be restored."
            return SnapshotNotFound(what, hint=hint)
    versions = ", ".join(str(entry.version) for entry in there if entry.state == "committed")
    hint = f"Its versions are: {versions}." if versions else "gms snapshot list shows what there is; each root has to be given with --root."
    return SnapshotNotFound(f"there is no snapshot {asked} in these roots", hint=hint)
