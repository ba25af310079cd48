"""What elects the primary: one protocol, and the locks that a configuration can name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gms_core.errors import ConfigurationError
from gms_core.failover.elector.address import ETCD_FORM, K8S_FORM
from gms_core.failover.elector.lock import StoreLock, store_lock_file
from gms_core.failover.elector.lock import check as check_store_lock
from gms_core.failover.flock import FileLock, Owner, check_directory, read_owner
from gms_core.failover.process import EngineProcess
from gms_core.failover.server_lock import ServerLock, lock_file

STORES = ("etcd", "k8s")
"""Kinds of locks that engines of several nodes can share."""


class FailoverLock(Protocol):
    """Elects one engine at a time. The elected one keeps it until its process has ended."""

    def open(self) -> None:
        """Get hold of what can be had before the engine is up. Call it early, before the process uses a GPU. Idempotent."""

    def acquire(self, process: EngineProcess, on_wait: Callable[[str], None] | None = None) -> int:
        """Be elected, however long that takes; returns the term, +1 or more with each election.

        It blocks; `close` in another thread ends it, at the latest when the lock is granted.

        Args:
            process: Who asks.
            on_wait: Called with the reason for which it waits; it must be quick and not raise.

        Raises:
            GmsError: It cannot be had.
        """

    def resume(self, process: EngineProcess, socket: Path) -> None:
        """Tell a server, which a primary has lost and found again, that this engine is elected. It never waits.

        Args:
            process: The primary's.
            socket: Of that server.

        Raises:
            GmsError: The server has gone again.
        """

    def close(self) -> None:
        """Give it up. An engine need not, since the lock ends with its process; it departs first if it does. Idempotent."""


def open_lock(text: str) -> FailoverLock:
    """Make the lock that a configuration names, and open it.

    Args:
        text: ``gms:NAME``, ``flock:/ABSOLUTE/PATH``, or one of `gms_core.failover.elector.address`: ``etcd://…``, ``k8s:…``.

    Raises:
        ConfigurationError: It is none of them, its file cannot be opened, or what it needs is not installed.
        PermissionRefused: The file is not this user's to open.
    """
    kind, _, where = text.partition(":")
    lock: FailoverLock
    if kind == "gms" and where:
        lock = ServerLock(where)
    elif kind == "flock" and where.startswith("/"):
        lock = FileLock(Path(where))
    elif kind in STORES:
        lock = StoreLock(text)
    else:
        raise ConfigurationError(f"{text!r} is no lock", hint=f"It must be gms:NAME, flock:/ABSOLUTE/PATH, {ETCD_FORM} or {K8S_FORM}.")
    lock.open()
    return lock


def check_lock(text: str) -> None:
    """Check what can be checked of a lock before there is an engine that asks for it.

    Args:
        text: The lock, as in `open_lock`.

    Raises:
        ConfigurationError: The directory of its file does not exist, or what it needs is not installed.
        PermissionRefused: The directory is not this user's to look at.
    """
    kind, _, where = text.partition(":")
    if kind == "flock":
        check_directory(Path(where))
    elif kind in STORES:
        check_store_lock(text)


def last_owner(text: str, socket: Path) -> Owner | None:
    """Who was elected last, as the lock's file tells it; None if it tells nothing.

    Args:
        text: The lock, as in `open_lock`.
        socket: Of the server of the engine's first device.
    """
    kind, _, where = text.partition(":")
    if kind == "flock":
        return read_owner(Path(where))
    return read_owner(store_lock_file(socket, text) if kind in STORES else lock_file(socket, where))
