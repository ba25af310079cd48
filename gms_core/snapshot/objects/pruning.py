"""Removing snapshots from an object store, and what was left of saves that did not become one.

What is removed is given up first: its ``COMMITTED`` says so from then on, for good. Then its objects are deleted, and whatever ends this process,
what is left is known as rubbish. Without locks nobody knows who reads: a restore of a version that is being removed fails, and publishes nothing.

A save that has not ended is given up when it is certain that nobody goes on with it: it says so itself, or its process is gone from this machine. A
removal, but no save, also takes one for ended that has not made an object for `IDLE_S`, by the store's clock, and says so; and any, when it is told
to. If that one's saver lives after all, it cannot commit, and its error says who has given it up.
"""

from __future__ import annotations

import datetime as dt
import logging
import socket
from collections.abc import Sequence

from gms_core.errors import GmsError, SnapshotBusy, SnapshotNotFound
from gms_core.snapshot.manifest import FORMAT
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.catalogue import open_version
from gms_core.snapshot.objects.records import Removed, now, verdict
from gms_core.snapshot.objects.root import ObjectRoot
from gms_core.snapshot.objects.versions import Standing, Version, standing, utc_now, versions
from gms_core.snapshot.on_disk import COMMITTED, Reference, check_name, write
from gms_core.snapshot.pruning import Pruned, check_choice

log = logging.getLogger(__name__)

_CLOCK_TRIES = 10


def prune(root: ObjectRoot, name: str, *, keep: int | None = None, version: int = 0, incomplete: bool = False) -> Pruned:
    """Remove snapshots of a name, and what was left of saves.

    Args:
        root: Where they lie.
        name: Theirs.
        keep: How many of the newest stay; None for all of them, so that only what was left of saves is removed. One whose manifest is damaged is
            not counted, and stays until its version is named.
        version: The only one to be removed, in place of ``keep``. It may be one that was not committed: it is given up, whoever saves it.
        incomplete: Give up every save that has not ended, whoever goes on with it.

    Raises:
        InvalidArgument: Both, or a negative number.
        SnapshotNotFound: There is no such version.
        BackendUnavailable: The store would not keep a saver and a removal apart.
        GmsError: The store does not answer as it should, or the credentials do not allow it.
    """
    check_choice(keep, version)
    check_name(name)
    root.check_conditions()
    there = versions(root.bucket, name)
    if not there:
        raise SnapshotNotFound(f"there is no snapshot {name} in {root.bucket.url}", hint="gms snapshot list shows what there is.")
    stands = {one.number: standing(root.bucket, one, utc_now()) for one in there}
    known = {one.number: one for one in there}
    if version and stands.get(version, Standing("removed", True)).state == "removed":
        raise SnapshotNotFound(f"there is no snapshot {Reference(name, version)} in {root.bucket.url}", hint="gms snapshot list shows what there is.")
    chosen = [version] if version else _older(root.bucket, there, stands, keep) if keep is not None else []
    removed, swept = [], []
    for number in chosen:
        if stands[number].state in ("committed", "damaged"):
            _replace(root.bucket, known[number], stands[number].id)
            _delete(root.bucket, known[number])
            removed.append(number)
        elif _give_up(root.bucket, known[number], stands[number], "it was removed by its version"):
            swept.append(root.bucket.url_of(known[number].folder))
        else:
            raise SnapshotBusy(f"{Reference(name, number)} was committed just now", hint="Prune it again if it should go all the same.")
    others = [one for one in there if one.number not in chosen]
    swept += sweep(root, others, stands, idle=True, all_others=incomplete and not version)
    return Pruned(tuple(removed), (), tuple(swept))


def sweep(
    root: ObjectRoot, there: Sequence[Version], known: dict[int, Standing] | None = None, *, idle: bool = False, all_others: bool = False
) -> list[str]:
    """Remove what was left under a name of saves that have ended without a snapshot, and of removals.

    Args:
        root: Where.
        there: All versions, as they were listed.
        known: How they stand, where that is known already.
        idle: Take saves for ended that have not made an object for a long time.
        all_others: Take all saves for ended.

    Returns:
        URLs of what was removed.
    """
    swept = []
    clock: dt.datetime | None = None
    for version in there:
        stands = (known or {}).get(version.number) or standing(root.bucket, version, utc_now())
        if version.is_trace or stands.state in ("committed", "damaged"):
            continue
        reason = "it had ended without a snapshot"
        if not stands.ended:
            if idle and not all_others:
                clock = clock or store_clock(root.bucket, version.name)
                stands = standing(root.bucket, version, clock)
            if not all_others and not (idle and stands.state == "unfinished"):
                continue
            reason = "it was given up on request" if all_others else f"nothing was written since {version.newest:%Y-%m-%dT%H:%M:%SZ}"
            log.warning("%s@%d is given up, though whether it is still being saved is not known: %s", version.name, version.number, reason)
        if _give_up(root.bucket, version, stands, reason):
            swept.append(root.bucket.url_of(version.folder))
    for url in swept:
        log.info("%s was left by a save or a removal that did not end, and is removed", url)
    return swept


def _older(bucket: Bucket, there: Sequence[Version], stands: dict[int, Standing], keep: int) -> list[int]:
    """All snapshots but the newest ones. What cannot be restored is neither counted nor chosen: else it would stay in place of the last good one."""
    good = []
    for version in there:
        if stands[version.number].state not in ("committed", "damaged"):
            continue
        try:
            with open_version(bucket, version):
                good.append(version.number)
        except GmsError as error:
            log.warning("%s@%d is not counted, and stays until it is removed by its version: %s", version.name, version.number, error)
    return good[: max(0, len(good) - keep)]


def _give_up(bucket: Bucket, version: Version, stands: Standing, reason: str) -> bool:
    """Have a version never become a snapshot, and delete its objects. Returns False if it has become one just now."""
    if stands.state != "removed":
        key = f"{version.folder}/{COMMITTED}"
        there = bucket.create(key, _removed(stands.id, reason))
        if there is not None and not isinstance(verdict(there, bucket.url_of(key)), Removed):
            return False
    _delete(bucket, version)
    return True


def _replace(bucket: Bucket, version: Version, identifier: str) -> None:
    """Have a snapshot be none any more, all at once."""
    bucket.write(f"{version.folder}/{COMMITTED}", _removed(identifier, "it was pruned"))


def _removed(identifier: str, reason: str) -> bytes:
    return write(Removed(FORMAT, identifier, now(), socket.gethostname(), reason))


def _delete(bucket: Bucket, version: Version) -> None:
    """Delete all of a version but what says that it is gone."""
    bucket.delete(f"{version.folder}/{key}" for key in bucket.objects(version.folder) if key != COMMITTED)


def store_clock(bucket: Bucket, name: str) -> dt.datetime:
    """The time that the store gives to an object that is made now."""
    key = f"{name}/clock"  # one for all: it is newest whoever has made it, and nothing but it is left when this process is killed
    for left in reversed(range(_CLOCK_TRIES)):
        bucket.write(key, b"")
        try:
            return bucket.modified(key)
        except SnapshotNotFound:  # another one has asked meanwhile, and has taken it away
            if not left:
                raise
        finally:
            bucket.delete([key])
    raise AssertionError
