"""What backends that read straight into the device's memory have in common: whether they reach it, and what is said when a read has failed."""

from __future__ import annotations

from collections.abc import Sequence

from gms_core.errors import BackendUnavailable, GmsError, TransferFailed
from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.chunks import Chunk
from gms_core.snapshot.files import shard_file
from gms_core.snapshot.transfer import HOST_MEMORY, Job, Memory, Place


def all_places(job: Job, memory: Memory, *, of_gpu: bool, backend: str) -> Sequence[Place]:
    """Where all of a job's image lies in memory.

    Args:
        job: The backend's.
        memory: It has arrived.
        of_gpu: Whether the backend reads into a GPU's memory, or into that of the host.
        backend: Its name.

    Raises:
        BackendUnavailable: The memory is none that the backend reaches.
        TransferCancelled: It is not there any more.
    """
    places = memory.places(0, max(piece.offset + piece.size for piece in job.pieces))
    if any((place.gpu != HOST_MEMORY) != of_gpu for place in places):
        reached, other = ("a GPU's memory", "the device 'host'") if of_gpu else ("memory of the device 'host'", "a GPU")
        raise BackendUnavailable(
            f"the transfer backend {backend!r} reads into {reached} alone, and this is {other}", hint="Use the backend 'staged'."
        )
    return places


def explained(chunk: Chunk, buffer: Buffer, library: str, error: Exception | str) -> GmsError:
    """Why a chunk could not be read: what a plain read of it says, or, if that works, what the library said.

    Args:
        chunk: It has failed, and nothing of it is under way.
        buffer: In host memory, for that plain read.
        library: What has failed.
        error: What it said.
    """
    try:
        chunk.file.read(buffer.view[: chunk.size], chunk.position)
    except GmsError as plain:
        return plain
    path = shard_file(chunk.file).path
    return TransferFailed(
        f"{library} could not read {chunk.size} bytes at position {chunk.position} of {path} into the device's memory: {error}; "
        "a plain read of them works",
        hint="Restore with --backend staged. What the library has printed may say more.",
        details={"file": str(path), "position": str(chunk.position)},
    )
