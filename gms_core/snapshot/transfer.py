"""The interface between snapshots and what moves their bytes. A backend knows files, memory and blocks, and nothing else of GMS.

A backend is asked in this order: `TransferBackend.probe`, whether it can be used here; `TransferBackend.check`, whether it can do this job; then
`TransferBackend.open`, which begins it. Names of backends are those of the field. A command asks the first two, and a process that it starts calls
`TransferBackend.open` without a `TransferBackend.probe` before it: what a backend needs it has to load there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from gms_core.snapshot.plan import Piece

Direction = Literal["save", "restore"]

Direct = Literal["auto", "always", "never"]
"""Past the page cache: unless what is read is in memory already, wherever the filesystem can, or not."""

Where = Path | str
"""Where something lies: the path of a file or a folder, or the URL of an object or of what its name begins with."""


class Probe(NamedTuple):
    """Whether a backend can be used on this machine.

    Attributes:
        usable: Whether.
        reason: Why not, and what to do about it; or what it will use, such as a library's version.
    """

    usable: bool
    reason: str


class File(NamedTuple):
    """One shard's file, or object.

    Attributes:
        path: Absolute. When saving, it is there already, with its whole size; an object is not. Of an object: its URL.
        root: The ``root_id`` of the root in which it lies: files of one root share a disk.
        size: Bytes.
    """

    path: Where
    root: str
    size: int


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be moved between files, or objects, and one device's memory.

    Attributes:
        direction: ``save`` reads memory and writes files, ``restore`` the reverse.
        files: By the index that pieces have.
        pieces: In the order of the image.
        checksums: When restoring, xxh3_64 of each block by its number: a block that has another one fails the job. Empty when saving.
        block_bytes: Of the largest piece.
        workers: Threads; 0 for as many as suit the backend.
        options: The backend's own, by name.
        at_once: Images that are moved at once on this machine, this one among them: they share its processors.
        objects: Whether its files are objects of a store. Only a backend whose attribute ``objects`` is true is given such a job, and no other.
        from_disk: Whether it is the disk that is asked, and not what the machine remembers of it: for whoever verifies a snapshot.
    """

    direction: Direction
    files: Sequence[File]
    pieces: Sequence[Piece]
    checksums: Sequence[int]
    block_bytes: int
    workers: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    objects: bool = False
    from_disk: bool = False
    at_once: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.size for piece in self.pieces)


HOST_MEMORY = -1
"""The number of no GPU."""


class Place(NamedTuple):
    """A contiguous range of an image's memory, as this process reaches it.

    Attributes:
        address: Of its first byte.
        size: Bytes.
        gpu: Number of the GPU, as CUDA counts them in this process; `HOST_MEMORY` where a CPU can read and write it.
    """

    address: int
    size: int
    gpu: int = HOST_MEMORY


class LaneHash(Protocol):
    """Finds checksums of what lies in the device's memory, without the host. It belongs to a lane, and to that lane's thread."""

    @property
    def at_once(self) -> int:
        """Blocks that `begin` takes at most; as many are best."""

    @property
    def is_ready(self) -> bool:
        """Whether `begin` would not wait until the device has been made ready."""

    def begin(self, blocks: Sequence[tuple[int, int]]) -> int | None:
        """Begin to hash parts of the image, once all copies that the lane has begun are done.

        Args:
            blocks: Offset in the image, and bytes, of each.

        Returns:
            A ticket for `end`; None if the device could not be made ready, and will not hash anything.

        Raises:
            DriverError: Something is wrong with the device.
        """

    def end(self, ticket: int) -> list[int]:
        """Wait for the checksums, xxh3_64, and return them in the blocks' order. Each ticket is asked for once."""


class CopyLane(Protocol):
    """One thread's way between host buffers and the device's memory. It is used by one thread alone.

    Its copies may go on behind its back, one after the other, in the order in which they were begun.
    """

    def arrive(self) -> None:
        """Come back once the memory is there.

        Raises:
            TransferCancelled: It will never be there, or the lane was abandoned.
        """

    def abandon(self) -> None:
        """Make a thread that waits for the memory give up. Safe from any thread, idempotent; copies that are under way go on."""

    def to_memory(self, offset: int, source: int, size: int) -> int:
        """Begin to copy from a host address to the image's offset; returns a ticket for `wait`. Blocks until the memory is there.

        Raises:
            TransferCancelled: It will never be there, or the lane was abandoned.
        """

    def from_memory(self, target: int, offset: int, size: int) -> int:
        """Begin to copy from the image's offset to a host address; returns a ticket for `wait`."""

    def wait(self, ticket: int) -> None:
        """Come back once a copy is done."""

    def hash(self) -> LaneHash | None:
        """What finds checksums on the device; None where the host has to. It is asked for once the lane has arrived; see `Memory.prepare_hash`.

        Where it cannot after all, that is known only when it is asked for a checksum.
        """

    def close(self) -> None:
        """Wait for all copies, and all that is hashed, and give up what the lane has. Idempotent."""


class Memory(Protocol):
    """The memory of one image, in this process: CUDA or ``host``. When restoring, it may appear only after reading has begun."""

    def lane(self, *, spin: bool = False) -> CopyLane:
        """A lane for one thread. It takes nothing until that thread uses it.

        Args:
            spin: Whether its thread keeps its core while it waits for a copy, and so goes on some microseconds sooner.
        """

    def prepare_hash(self, block_bytes: int) -> None:
        """Make ready to find checksums on the device, behind the caller's back, for those who will ask their lane for it. Once at most.

        Args:
            block_bytes: Of the largest block; every other one, but for the image's last one, has as many.
        """

    def register(self, address: int, size: int, *, writable: bool = True) -> None:
        """Make host memory fit for fast copies: it is pinned, where that means something.

        Args:
            address: Of its first page.
            size: Bytes.
            writable: Whether this process may write to it; copies to the device need not.

        Raises:
            DriverError: It cannot be.
        """

    def unregister(self, address: int) -> None:
        """Undo `register`."""

    def places(self, offset: int, size: int) -> Sequence[Place]:
        """Where a part of the image lies, for a backend that moves bytes there without buffers. Once a lane has arrived.

        Raises:
            BackendUnavailable: It lies nowhere: this memory keeps nothing.
            TransferCancelled: It is not there.
        """


@dataclass(frozen=True, slots=True)
class Phase:
    """What a transfer has spent its time on.

    Attributes:
        name: Such as ``read``, ``arrive`` (until the memory is there), ``hash``, ``copy`` or ``wait`` (for copies).
        seconds: Summed over the threads.
    """

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Moved:
    """A finished transfer.

    Attributes:
        bytes: How many were moved.
        seconds: From the begin of the first read to the end of the last copy.
        checksums: xxh3_64 of each block, by its number.
        phases: What the threads have spent their time on.
        notes: What a user should know of how it went, such as files that could only be read through the page cache.
    """

    bytes: int
    seconds: float
    checksums: Mapping[int, int]
    phases: Sequence[Phase] = ()
    notes: Sequence[str] = ()


def is_quiet(transfer: Transfer) -> bool:
    """Whether nothing of a transfer whose `finish` has raised is under way; those that say nothing about it keep to that."""
    return bool(getattr(transfer, "is_quiet", True))


class Transfer(Protocol):
    """A job that is under way, in threads of its own."""

    def poll(self) -> int:
        """Bytes that have arrived so far: in memory, or handed to the kernel. Never blocks."""

    def finish(self) -> Moved:
        """Wait for the end; nothing of the job is under way when it returns or raises. Written bytes may still have to be synced.

        Where that cannot be known, it raises, and the transfer has an attribute ``is_quiet`` that is False: the job's memory must not be given up
        before this process has ended.

        Raises:
            SnapshotDamaged: A block has another checksum, or a file is too short; the message names file and position.
            TransferFailed: The kernel, or a library, could not read or write; the message names the file.
            TransferCancelled: `cancel` was called.
        """

    def cancel(self) -> None:
        """End the job early: `finish` raises soon. Safe from any thread, idempotent."""


@runtime_checkable
class TransferBackend(Protocol):
    """Moves bytes between files and memory; or, if it has an attribute ``objects`` that is true, between objects of a store and memory."""

    @property
    def name(self) -> str:
        """What users call it, such as ``staged``."""

    @property
    def directions(self) -> frozenset[Direction]:
        """What it can do."""

    def probe(self) -> Probe:
        """Whether it can be used here. It never hangs, and imports nothing heavy into this process unless it can be used."""

    def check(self, job: Job) -> None:
        """Refuse a job that it cannot do. It is asked before anything is begun, too, with a job that has neither files nor pieces yet.

        Raises:
            InvalidArgument: An option that it does not know, or a value that it cannot have.
            BackendUnavailable: What it lacks for this job.
        """

    def open(self, job: Job, memory: Memory) -> Transfer:
        """Begin a job."""
