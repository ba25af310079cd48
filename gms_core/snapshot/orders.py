"""What a command tells a process that moves one image, and what that tells in return: one line of JSON each."""

from __future__ import annotations

import msgspec

from gms_core.snapshot.manifest import Image
from gms_core.snapshot.objects.target import ObjectTarget
from gms_core.snapshot.staging import Target


class _Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every order has.

    Attributes:
        index: Of the image.
        backend: What moves the bytes, by its name.
        workers: Threads; 0 for as many as suit the backend.
        options: The backend's own.
        at_once: Images that are moved at once on this machine.
    """

    index: int
    backend: str
    workers: int = 0
    options: dict[str, str] = {}
    at_once: int = 1


class SaveOrder(_Order, tag="save", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Save what a pool has committed.

    Attributes:
        socket: Of the device's server.
        pool: Its name.
        target: Where to.
    """

    socket: str
    pool: str
    target: Target | ObjectTarget


class RestoreOrder(_Order, tag="restore", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Publish an image.

    Attributes:
        socket: Of the device's server.
        pool: Where to.
        roots: Of the snapshot.
        snapshot: ``NAME@VERSION``.
        id: The snapshot's.
        timeout_s: Seconds to wait for the right to write.
        memory_timeout_s: Seconds to wait for memory that others release.
        replace: Drop this committed generation first; None drops nothing.
        pin: Keep the generation without readers.
    """

    socket: str
    pool: str
    roots: tuple[str, ...]
    snapshot: str
    id: str
    timeout_s: float
    memory_timeout_s: float
    replace: int | None = None
    pin: bool = False


class PullOrder(_Order, tag="pull", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Publish an image of a peer's.

    Attributes:
        socket: Of the device's server.
        pool: Where to.
        peer: ``HOST:PORT``.
        secret: File of the secret.
        id: Of what the peer serves.
        timeout_s: Seconds to wait for the right to write.
        memory_timeout_s: Seconds to wait for memory that others release.
        replace: Drop this committed generation first; None drops nothing.
        pin: Keep the generation without readers.
    """

    socket: str
    pool: str
    peer: str
    secret: str
    id: str
    timeout_s: float
    memory_timeout_s: float
    replace: int | None = None
    pin: bool = False


class VerifyOrder(_Order, tag="verify", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Compare an image with its checksums.

    Attributes:
        roots: Of the snapshot.
        snapshot: ``NAME@VERSION``.
        id: The snapshot's.
    """

    roots: tuple[str, ...]
    snapshot: str
    id: str


Order = SaveOrder | RestoreOrder | PullOrder | VerifyOrder

COMMIT = b"commit\n"
"""What the process is told once all images have arrived."""


class Begun(msgspec.Struct, tag="begun", frozen=True):
    """The transfer has begun.

    Attributes:
        bytes: Of it.
    """

    bytes: int


class Moving(msgspec.Struct, tag="moving", frozen=True):
    """How far it is.

    Attributes:
        bytes: Moved so far.
    """

    bytes: int


class Waiting(msgspec.Struct, tag="waiting", frozen=True):
    """It waits for others.

    Attributes:
        reason: For what.
    """

    reason: str


class Arrived(msgspec.Struct, tag="arrived", frozen=True):
    """The image is in memory, as it was saved. It is published once the process is told to."""


class Figures(msgspec.Struct, frozen=True):
    """What a transfer has cost.

    Attributes:
        bytes: Moved.
        seconds: From the first read to the last copy.
        kept_bytes: That a save which was resumed had written already.
        threads: Seconds by phase, such as ``read``, ``hash``, ``copy`` and ``wait``, summed over all threads.
        around: Seconds by step before, after or beside the transfer, such as ``prepare``, ``sync`` or ``commit``.
        notes: What a user should know of how it went.
    """

    bytes: int
    seconds: float
    kept_bytes: int = 0
    threads: dict[str, float] = {}
    around: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class Done(msgspec.Struct, tag="done", frozen=True):
    """It is done.

    Attributes:
        figures: What it has cost.
        image: What was saved, for the manifest.
        generation: What was published; 0 if nothing was.
    """

    figures: Figures
    image: Image | None = None
    generation: int = 0


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """It has failed; these are the fields of the error.

    Attributes:
        code: Which one it is.
        message: What happened.
        hint: What to do about it.
        details: Facts.
    """

    code: str
    message: str
    hint: str = ""
    details: dict[str, str] = {}


Report = Begun | Moving | Waiting | Arrived | Done | Failed
"""A process tells ``Done`` or ``Failed`` at last, and at most once."""
Progress = Begun | Moving | Waiting
"""What a user may watch."""
