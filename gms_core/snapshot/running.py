"""A transfer from its begin to its end: when the block is left, in whatever way, nothing touches files or memory any more, or that is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from gms_core.errors import GmsError, InvalidArgument
from gms_core.snapshot.memories import ArenaMemory
from gms_core.snapshot.transfer import Job, Moved, Transfer, TransferBackend, is_quiet

OnTransfer = Callable[[Transfer, int], None]
"""Is told of a transfer that has begun, and of its bytes, so that somebody can watch it."""


class _Nothing:
    """The transfer of no bytes."""

    def poll(self) -> int:
        """See `Transfer.poll`."""
        return 0

    def finish(self) -> Moved:
        """See `Transfer.finish`."""
        return Moved(0, 0.0, {})

    def cancel(self) -> None:
        """See `Transfer.cancel`."""


def check(backend: TransferBackend, job: Job) -> None:
    """Refuse a job that a backend cannot do. One without pieces asks about the direction, the threads and the options alone.

    Raises:
        InvalidArgument: The backend does not move bytes in this direction, or does not know an option.
        BackendUnavailable: It lacks something for this job.
    """
    if job.direction not in backend.directions:
        raise InvalidArgument(f"the transfer backend {backend.name!r} does not {job.direction}", hint="Name another one with --backend.")
    if job.objects != moves_objects(backend):
        why = "files, and the snapshot's root is in an object store" if job.objects else "objects, and the snapshot's roots are directories"
        raise InvalidArgument(
            f"the transfer backend {backend.name!r} moves {why}",
            hint="Name another backend with --backend, or none; a root in an object store is a URL, such as s3://bucket/prefix.",
        )
    backend.check(job)


def moves_objects(backend: TransferBackend) -> bool:
    """Whether a backend moves objects of stores, and no files. One that says nothing of it, such as a plugin's, moves files."""
    return bool(getattr(backend, "objects", False))


def verifies(backend: TransferBackend) -> bool:
    """Whether a backend can compare a snapshot with its checksums without memory for it. One that says nothing of it, such as a plugin's, can."""
    return bool(getattr(backend, "verifies", True))


@contextlib.contextmanager
def running(
    backend: TransferBackend,
    job: Job,
    memory: ArenaMemory,
    on_transfer: OnTransfer | None = None,
    on_hang: Callable[[BaseException], None] | None = None,
) -> Iterator[Transfer]:
    """Begin a job; who is in the block finishes it, or else it is cancelled.

    Args:
        backend: Moves the bytes.
        job: A part of an image, or all of it; it may have no bytes.
        memory: Of the image.
        on_transfer: Is told of the transfer.
        on_hang: Is called before an error is raised when the transfer may still touch the memory then.

    Raises:
        InvalidArgument: See `check`.
        BackendUnavailable: See `check`.
    """
    check(backend, job)
    if not job.pieces:
        yield _Nothing()
        return
    transfer = backend.open(job, memory)
    try:
        if on_transfer is not None:
            on_transfer(transfer, job.size)
        yield transfer
    except BaseException as error:
        memory.never()
        transfer.cancel()
        with contextlib.suppress(GmsError):
            transfer.finish()
        if on_hang is not None and not is_quiet(transfer):
            on_hang(error)
        raise
