"""Removing snapshots, and what was left of saves that did not become one.

What has ``COMMITTED`` is never touched but on request, and never while it is read. It is taken away first; then the folders get another name, so that
whatever ends this process, what is left is known as rubbish.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gms_core.errors import GmsError, InvalidArgument, SnapshotBusy, SnapshotNotFound
from gms_core.snapshot.folders import Folder
from gms_core.snapshot.locks import NameLock, lock_for_removing
from gms_core.snapshot.on_disk import COMMITTED, MANIFEST, Reference, Unfinished, check_name, unfinished, version_of
from gms_core.snapshot.reading import is_trace, part_of, read_manifest
from gms_core.snapshot.roots import Root

log = logging.getLogger(__name__)

_NO_ID = "0" * 16


class Pruned(NamedTuple):
    """What became of some snapshots of one name.

    Attributes:
        removed: Versions that are gone.
        in_use: Versions that should have gone, but are being read; in an object store that is not known of any.
        swept: Folders or URLs, of saves that did not become a snapshot and of parts that belong to none, that are gone.
    """

    removed: tuple[int, ...]
    in_use: tuple[int, ...]
    swept: tuple[str, ...]


def prune(roots: Sequence[Root], name: str, *, keep: int | None = None, version: int = 0, incomplete: bool = False) -> Pruned:
    """Remove snapshots of a name, and what was left of saves.

    Args:
        roots: All that they lie in.
        name: Theirs.
        keep: How many of the newest stay; None for all of them, so that only what was left of saves is removed. One whose manifest is damaged is
            not counted, and stays until its version is named.
        version: The only one to be removed, in place of ``keep``.
        incomplete: Remove also what lies partly in roots that were not given, such as one of a disk that is lost; without ``version`` also parts
            of snapshots whose first root was not given.

    Raises:
        InvalidArgument: Both, or a negative number.
        SnapshotNotFound: There is no such version, or a root of a snapshot that is to go was not given; nothing of it was removed.
        SnapshotBusy: Somebody else saves or prunes under that name, or reads the version.
    """
    check_choice(keep, version)
    check_name(name)
    if not any(_has(root, name) for root in roots):
        raise SnapshotNotFound(f"there is no snapshot {name} in these roots", hint="gms snapshot list shows what there is.")
    with NameLock(roots, name) as lock:
        there = _committed(lock)
        if version and version not in there:
            raise SnapshotNotFound(f"there is no snapshot {Reference(name, version)} in these roots", hint="gms snapshot list shows what there is.")
        chosen = [version] if version else _older(lock, there, keep) if keep is not None else []
        if not incomplete:
            for number in chosen:
                _check_roots(lock, there[number], number)
        removed = [number for number in chosen if _remove(lock, there[number], number)]
        in_use = [number for number in chosen if number not in removed]
        if version and in_use:
            raise SnapshotBusy(f"snapshot {Reference(name, version)} is being read", hint="Prune it when that has ended.")
        return Pruned(tuple(removed), tuple(in_use), tuple(sweep(lock, incomplete=incomplete and not version)))


def check_choice(keep: int | None, version: int) -> None:
    """Raise `InvalidArgument` if it does not say what is to be removed."""
    if (keep is not None and (version or keep < 0)) or version < 0:
        raise InvalidArgument("either a version is removed, or as many of the newest as are named are kept")


def _has(root: Root, name: str) -> bool:
    with Folder.open(root.path) as top:
        return top.has(name)


def sweep(lock: NameLock, spared: Unfinished | None = None, *, incomplete: bool = False) -> list[str]:
    """Remove what was left under a name by processes that were ended: nobody else is at work under it now.

    A part of a snapshot whose first root was not given stays, unless told otherwise: there it may be committed.

    Args:
        lock: On the name.
        spared: A save that is to be resumed.
        incomplete: First roots that were not given are lost.

    Returns:
        What was removed.
    """
    swept = []
    for root, folder in lock.folders.items():
        for child in folder.names():
            begun = unfinished(child)
            if begun is None and version_of(child) and _is_orphan(lock, root, folder, child, incomplete=incomplete):
                begun = Unfinished("removing", version_of(child), _NO_ID)
                folder.rename(child, begun.folder)
            if begun is not None and begun != spared:
                folder.remove(begun.folder)
                swept.append(f"{folder.path / child}")
    for path in swept:
        log.info("%s was left by a save or a removal that did not end, and is removed", path)
    return swept


def versions_of(folder: Folder) -> list[int]:
    """All versions that a name's folder has something of."""
    numbers = [begun.version if (begun := unfinished(child)) else version_of(child) for child in folder.names()]
    return [number for number in numbers if number]


def _is_orphan(lock: NameLock, root: str, folder: Folder, child: str, *, incomplete: bool) -> bool:
    """Whether the folder of a version is no snapshot, and no part of one, as far as can be known, or of one whose first root is lost."""
    with folder.child(child) as inside:
        if inside.has(COMMITTED):
            return False
        part = part_of(inside)
    if part is None:
        log.warning("%s says not to what it belongs, and is left alone", folder.path / child)
        return False
    first = lock.folders.get(part.first)
    if first is None and incomplete:
        return True
    if first is None:
        log.warning("%s is left alone: its manifest is, or was to be, in root %s, which was not given", folder.path / child, part.first)
        return False
    if part.first == root or not first.has(child):
        return True
    with first.child(child) as beginning:
        if not beginning.has(COMMITTED):
            return True
        other = part_of(beginning)
        return other is not None and other.id != part.id


def _committed(lock: NameLock) -> dict[int, str]:
    """The versions that are snapshots, and the first root of each.

    Raises:
        InvalidArgument: Two roots have one of the same version, which do not belong together.
    """
    found: dict[int, str] = {}
    for root, folder in lock.folders.items():
        for version in filter(None, map(version_of, folder.names())):
            with folder.child(str(version)) as inside:
                if not inside.has(COMMITTED) or is_trace(inside):
                    continue
            if version in found:
                raise InvalidArgument(
                    f"{folder.path / str(version)} and {lock.folders[found[version]].path / str(version)} are two snapshots",
                    hint="Give the root of one of them alone with --root.",
                )
            found[version] = root
    return found


def _older(lock: NameLock, there: Mapping[int, str], keep: int) -> list[int]:
    """All snapshots but the newest ones. What cannot be restored is neither counted nor chosen: else it would stay in place of the last good one."""
    good = []
    for version, first in sorted(there.items()):
        with lock.folders[first].child(str(version)) as inside:
            try:
                read_manifest(Reference(lock.name, version), inside)
            except GmsError as error:
                log.warning("%s@%d is not counted, and stays until it is removed by its version: %s", lock.name, version, error)
                continue
        good.append(version)
    return good[: max(0, len(good) - keep)]


def _check_roots(lock: NameLock, first: str, version: int) -> None:
    """Raise `SnapshotNotFound` if a part of a snapshot lies in a root that was not given. One whose manifest is damaged does not tell."""
    with lock.folders[first].child(str(version)) as inside:
        try:
            manifest = read_manifest(Reference(lock.name, version), inside)
        except GmsError as error:
            log.warning("in which roots %s@%d lies is not known: %s", lock.name, version, error)
            return
    if missing := sorted({shard.root for image in manifest.images for shard in image.shards} - lock.folders.keys()):
        raise SnapshotNotFound(
            f"{lock.name}@{version} lies also in root {', '.join(missing)}, which was not given",
            hint="Give all of its roots with --root, so that no part of it stays; or say that those are lost.",
        )


def _remove(lock: NameLock, first: str, version: int) -> bool:
    """Remove a snapshot, unless it is being read. Returns whether it is gone."""
    folder = lock.folders[first]
    with folder.child(str(version)) as inside:
        part = part_of(inside)
        held = None
        if inside.has(MANIFEST) and (held := lock_for_removing(inside, MANIFEST)) is None:
            return False
        try:
            inside.unlink(COMMITTED)
            begun = Unfinished("removing", version, part.id if part is not None else _NO_ID)
            if unfinished(begun.folder) != begun:  # the id is none, and would make no name that is known as rubbish
                begun = begun._replace(id=_NO_ID)
            folder.rename(str(version), begun.folder)
        finally:
            if held is not None:
                os.close(held)
    for other in lock.folders.values():
        if other is not folder and other.has(str(version)):
            with other.child(str(version)) as inside:
                belongs = part is not None and part_of(inside) == part
            if belongs:
                other.rename(str(version), begun.folder)
    for each in lock.folders.values():
        each.remove(begun.folder)
    return True
