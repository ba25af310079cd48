"""What this process holds of GMS: sessions, leases and arenas, from loading until the process ends, and the commit that is still due."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from gms_core.amounts import amount
from gms_core.client import ReadLease, Session, WriteLease
from gms_core.engine_log import log
from gms_core.layout import Identity


class Figures(msgspec.Struct, frozen=True):
    """What one load came to, as the log line shows it and as JSON.

    Attributes:
        event: ``published`` or ``attached``.
        bytes: Of the committed layout.
        seconds: From the lease to its being loaded and published, or mapped and installed; waiting for other processes is apart.
        wait_seconds: Spent waiting for the lease.
        checkpoint_bytes: Read from the checkpoint; -1 if the engine's own loader did not say.
    """

    event: Literal["published", "attached"]
    pool: str
    generation: int
    bytes: int
    seconds: float
    wait_seconds: float
    checkpoint_bytes: int

    def line(self) -> str:
        """The figures as ``key=value`` pairs."""
        return "gms " + " ".join(
            f"{key}={value:.6f}" if isinstance(value, float) else f"{key}={value}" for key, value in msgspec.structs.asdict(self).items()
        )


@dataclass(slots=True)
class Holding:
    """One pool that this process writes or reads.

    Attributes:
        neighbours: Bytes of the device that other processes have taken (negative: have freed) less, while this one waited for its lease.
        external_bytes: Bytes of the layout if another process published it, else 0.
    """

    session: Session
    lease: WriteLease | ReadLease
    neighbours: int = 0
    external_bytes: int = 0
    figures: Figures | None = None


@dataclass(slots=True)
class Due:
    """A commit that waits until the engine is ready.

    Attributes:
        identity: Gives the final identity; it may have to wait for the checkpoint's digest.
    """

    holding: Holding
    lease: WriteLease
    manifest: bytes
    identity: Callable[[], Identity]
    seconds: float
    wait_seconds: float
    checkpoint_bytes: int


_lock = threading.RLock()
_holdings: list[Holding] = []
_due: list[Due] = []
_deferred = False


def keep(holding: Holding) -> None:
    """Keep a session, its lease and its arena for the life of this process: tensors point into it."""
    with _lock:
        _holdings.append(holding)


def forget(holding: Holding) -> None:
    """Keep a holding no more: its session has ended, and no tensor that points into its arena is used any more. Idempotent."""
    with _lock:
        _holdings[:] = [kept for kept in _holdings if kept is not holding]


def current() -> Holding | None:
    """What was kept last, or None."""
    with _lock:
        return _holdings[-1] if _holdings else None


def all_kept() -> tuple[Holding, ...]:
    """What was kept, in order."""
    with _lock:
        return tuple(_holdings)


def defer_commits() -> None:
    """From now on drafts wait for `commit_due`."""
    global _deferred
    with _lock:
        _deferred = True


def commit(due: Due) -> None:
    """Publish a draft now, or once the engine is ready where commits are deferred."""
    with _lock:
        _due.append(due)
        if not _deferred:
            commit_due()


def commit_due() -> None:
    """Publish the drafts that wait.

    Raises:
        GmsError: A draft could not be published.
    """
    with _lock:
        while _due:
            due = _due.pop(0)
            start = time.perf_counter()
            identity = due.identity()
            lease = due.lease.commit(due.manifest, identity)
            due.holding.lease = lease
            report(
                due.holding,
                Figures(
                    "published",
                    lease.pool,
                    lease.layout.generation,
                    lease.layout.size,
                    due.seconds + time.perf_counter() - start,
                    due.wait_seconds,
                    due.checkpoint_bytes,
                ),
            )


def report(holding: Holding, figures: Figures) -> None:
    """Remember the figures of a load and say them in one line."""
    holding.figures = figures
    if figures.event == "published":
        log().info("published generation %d: %s in %.2f s [%s]", figures.generation, amount(figures.bytes), figures.seconds, figures.line())
    else:
        log().info(
            "attached to generation %d: %s in %.1f ms, %d bytes read from the checkpoint [%s]",
            figures.generation,
            amount(figures.bytes),
            figures.seconds * 1000,
            figures.checkpoint_bytes,
            figures.line(),
        )
