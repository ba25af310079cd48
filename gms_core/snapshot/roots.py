"""Roots: directories that snapshots lie in, each known by an id of its own, so that a disk may be mounted elsewhere later."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_core.errors import InvalidArgument, PermissionRefused, SnapshotDamaged, SnapshotNotFound, TransferFailed
from gms_core.snapshot.folders import Folder, explain, explained
from gms_core.snapshot.on_disk import ROOT_FILE

_ID = re.compile(rb"[0-9a-f]{32}\n?")
_SPARE_BYTES = 64 * 2**20
"""Bytes that are left free for manifests, and for what the file system itself needs."""


@dataclass(frozen=True, slots=True)
class Root:
    """A directory for snapshots.

    Attributes:
        id: 32 hexadecimal digits, made once and never changed.
        path: Where it is now; absolute.
    """

    id: str
    path: Path


def open_root(path: Path, *, create: bool = False) -> Root:
    """Find out which root a directory is.

    Args:
        path: The directory.
        create: Make it a root if it is none yet; the directory itself is made too, but not those above it: what should be mounted there may not be.

    Raises:
        SnapshotNotFound: There is no directory, or it is no root.
        PermissionRefused: This user may not use it.
        SnapshotDamaged: Its id cannot be read.
    """
    path = Path(os.path.abspath(path))
    if create and not path.parent.is_dir():
        raise SnapshotNotFound(
            f"{path.parent} is not there", hint="Mount what should be there, or make it: only the last directory of a root is made."
        )
    if create:
        with explained("made", path), contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            with contextlib.suppress(PermissionRefused), Folder.open(path.parent) as above:  # one that only root may list, such as
                above.sync()
    with _open(path) as folder:
        if create and not folder.has(ROOT_FILE):
            _give_id(folder)
        try:
            text = folder.read(ROOT_FILE)
        except SnapshotNotFound as error:
            raise SnapshotNotFound(
                f"{path} is no root of snapshots: it has no file {ROOT_FILE}", hint="Name the directory that was given when the snapshot was saved."
            ) from error
    if _ID.fullmatch(text) is None:
        raise SnapshotDamaged(
            f"{path / ROOT_FILE} holds no id of a root", hint="The manifests of its snapshots name the id: write it there, 32 hexadecimal digits."
        )
    return Root(text.decode().strip(), path)


def _open(path: Path) -> Folder:
    try:
        return Folder.open(path)
    except SnapshotNotFound as error:
        error.add_hint("Mount the disk that it is on, or name the directory where it is now.")
        raise


def open_roots(paths: Sequence[Path], *, create: bool = False) -> tuple[Root, ...]:
    """Find out which roots some directories are, in the same order.

    Raises:
        InvalidArgument: There is none, or one is named twice.
        GmsError: As `open_root` says.
    """
    if not paths:
        raise InvalidArgument("a snapshot needs a root", hint="Name a directory with --root.")
    roots = tuple(open_root(path, create=create) for path in paths)
    known: dict[str, Path] = {}
    for root in roots:
        if root.id in known:
            raise InvalidArgument(
                f"{known[root.id]} and {root.path} are one root, {root.id}",
                hint=f"Name each root once. If one disk is a copy of another, remove {ROOT_FILE} and its snapshots from the copy.",
            )
        known[root.id] = root.path
    return roots


def check_room(needed: Mapping[Path, int]) -> None:
    """Refuse early what cannot fit.

    Args:
        needed: Bytes that are to be written below each directory. Those on one file system share its room.

    Raises:
        TransferFailed: It cannot fit.
    """
    wanted: dict[int, tuple[Path, int]] = {}
    for path, size in needed.items():
        with explained("looked at", path):
            device = os.stat(path).st_dev
        first, so_far = wanted.get(device, (path, 0))
        wanted[device] = (first, so_far + size)
    for path, size in wanted.values():
        with explained("looked at", path):
            found = os.statvfs(path)
        free = found.f_bavail * found.f_frsize
        if size and found.f_blocks and size + _SPARE_BYTES > free:  # some file systems of networks do not tell
            raise TransferFailed(
                f"the file system of {path} has {free / 2**30:.2f} GiB free, and {(size + _SPARE_BYTES) / 2**30:.2f} GiB are to be written there",
                hint="Make room (gms snapshot prune removes old snapshots), or add a root on another disk.",
            )


def _give_id(folder: Folder) -> None:
    """Make a directory a root. If two processes do so at once, it has the id of the first."""
    temporary = f".{ROOT_FILE}-{secrets.token_hex(8)}"
    folder.write(temporary, f"{secrets.token_hex(16)}\n".encode())
    try:
        os.link(temporary, ROOT_FILE, src_dir_fd=folder.descriptor, dst_dir_fd=folder.descriptor, follow_symlinks=False)
    except FileExistsError:
        pass
    except PermissionError:  # a file system without hard links
        with explained("made", folder.path / ROOT_FILE):
            os.rename(temporary, ROOT_FILE, src_dir_fd=folder.descriptor, dst_dir_fd=folder.descriptor)
    except OSError as error:
        raise explain(error, "made", folder.path / ROOT_FILE) from error
    folder.unlink(temporary)
