"""One device server for each socket: a lock beside it that its server holds for as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from gms_core.errors import GmsError, ServerUnavailable
from gms_core.keeper.connection import end_at
from gms_core.private_files import open_private
from gms_core.runtime_dir import journal_path, keeper_path, lock_path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def owned(path: Path) -> Iterator[int]:
    """Own a socket's path for as long as the context lasts. Gives the descriptor of the lock file.

    Raises:
        ServerUnavailable: Another server owns it.
        PermissionRefused: What is there is not a file of this user's own.
        OSError: The lock file cannot be made.
    """
    lock = open_private(lock_path(path), os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ServerUnavailable(
                f"another server (pid {owner}) already owns {path}", hint="Stop it first, or use another --runtime-dir."
            ) from None
        yield lock
    finally:
        os.close(lock)


def give_up(path: Path) -> None:
    """Give up what a server has left that could not do so itself, unless another one has taken over. Never raises."""
    try:
        with owned(path):
            end_at(keeper_path(path))
            journal_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    except (OSError, GmsError) as error:
        log.debug("nothing of %s is given up: %s", path, error)
