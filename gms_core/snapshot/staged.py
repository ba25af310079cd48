"""GMS's own backends: what they have in common beside the engine, which is their options and their refusals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gms_core.errors import InvalidArgument
from gms_core.snapshot.engine import Route, StagedTransfer, Tuning
from gms_core.snapshot.files import JobFiles
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.transfer import Direct, Direction, Job, Memory, Probe, Transfer
from gms_core.snapshot.worker import Worker
from gms_core.vmm.undo import UndoStack

BOTH: frozenset[Direction] = frozenset({"save", "restore"})
LARGEST_CHUNK = 2**30
"""Linux reads and writes a little less than 2 GiB at once, and that not at a page's end."""

DIRECT: Mapping[str, Direct] = {"auto": "auto", "always": "always", "never": "never"}
"""The values of the option ``direct``."""

HASH: Mapping[str, bool] = {"auto": True, "host": False}
"""The values of the option ``hash``: a device that can finds the checksums of what is restored, or always the host."""

_Value = TypeVar("_Value")

DEADLINE = "deadline_s"
"""The option of backends that give up what never ends."""


def cores() -> int:
    """On which this process may run."""
    return len(os.sched_getaffinity(0))


class Pace(NamedTuple):
    """How much goes on at once, if not told otherwise.

    Attributes:
        threads: At most.
        depth: Reads or writes that a thread has under way at once.
        chunk_bytes: Read or written at once.
    """

    threads: int = 16
    depth: int = 1
    chunk_bytes: int = 8 * 2**20


@dataclass(frozen=True, slots=True)
class StagedBackend:
    """A backend made of the engine and of its own way to files. See `TransferBackend`.

    Options of a job: ``chunk_bytes``, read or written at once; ``buffers`` of each thread; ``depth``, reads that a thread has under way at once,
    where the backend can have several; ``direct``, which is ``auto``, ``always`` or ``never``; ``hash``, which is ``auto`` or ``host``.

    Attributes:
        name: What users call it.
        usable: See `TransferBackend.probe`.
        route: Opens its way to the files of a job.
        pace: From and to disks.
        in_memory: From files that are in memory.
        is_deep: Whether a thread can have more than one read or write under way at once.
        directions: What it can do.
        deadline_s: Seconds in which something that is under way has to end, if not told otherwise; 0 for a backend that waits as long as the kernel.
        worker: What its threads do: bytes go through buffers, unless it says otherwise.
    """

    name: str
    usable: Callable[[], Probe]
    route: Callable[[Job, JobFiles, Memory], Route]
    pace: Pace
    in_memory: Pace | None = None
    is_deep: bool = False
    directions: frozenset[Direction] = BOTH
    deadline_s: int = 0
    worker: type[Worker] = Worker

    @property
    def verifies(self) -> bool:
        """Whether it can read a snapshot into nothing: not if bytes go into a device's memory alone."""
        return self.worker is Worker

    def probe(self) -> Probe:
        """See `TransferBackend.probe`."""
        return self.usable()

    def check(self, job: Job) -> None:
        """See `TransferBackend.check`.

        Raises:
            InvalidArgument: The job contradicts itself, or has an option that the backend does not know.
        """
        check_pieces(job)
        self.tuning(job)

    def open(self, job: Job, memory: Memory) -> Transfer:
        """See `TransferBackend.open`.

        Raises:
            InvalidArgument: See `check`.
            SnapshotDamaged: A file is too short.
            TransferFailed: A file cannot be opened, or the machine has no room for the buffers.
        """
        check_pieces(job)
        tuning = self.tuning(job)
        with UndoStack() as undo:
            files = JobFiles(job, direct=tuning.direct)
            undo.push(files.close)
            if files.are_in_memory:
                tuning = self.tuning(job, in_memory=True)
            route = self.route(job, files, memory)
            undo.push(route.close)
            transfer = StagedTransfer(job, memory, files, route, tuning, self.worker)
            undo.commit()
        return transfer

    def tuning(self, job: Job, *, in_memory: bool = False) -> Tuning:
        """What a job's options come to.

        Args:
            job: What is to be moved.
            in_memory: Whether its files are in memory.

        Raises:
            InvalidArgument: One is not known, or has a value that it cannot have.
        """
        known = {"chunk_bytes", "buffers", "direct", "hash"} | ({"depth"} if self.is_deep else set()) | ({DEADLINE} if self.deadline_s else set())
        if unknown := sorted(job.options.keys() - known):
            raise InvalidArgument(f"the backend {self.name!r} has no option {unknown[0]!r}", hint=f"It has {', '.join(sorted(known))}.")
        pace = self.in_memory if in_memory and self.in_memory is not None else self.pace
        chunk = number_of(job, "chunk_bytes", pace.chunk_bytes, PAGE_BYTES, LARGEST_CHUNK)
        if chunk % PAGE_BYTES:
            raise InvalidArgument(f"the option chunk_bytes={chunk} is not a multiple of {PAGE_BYTES}")
        depth = number_of(job, "depth", pace.depth, 1, 256)
        buffers = number_of(job, "buffers", depth + (min(max(2, depth // 2), 16) if self.is_deep else 1), depth, 1024)
        direct, hashes = choice(job, "direct", DIRECT), choice(job, "hash", HASH)
        if direct == "auto" and (job.from_disk or self.worker is not Worker):  # what goes straight into a device's memory comes straight from a disk
            direct = "always"
        if self.deadline_s:
            deadline(job, self.deadline_s)
        if job.workers < 0:
            raise InvalidArgument(f"{job.workers} threads cannot be started")
        roots = len({file.root for file in job.files})
        # A thread that waits for a copy from memory keeps its core: some are left to the servers, and to other images' threads.
        free = cores() * 3 // 4 // job.at_once if in_memory else cores()
        workers = job.workers or max(0 if in_memory else 2 * roots, min(pace.threads, max(4, free)))
        largest = max((piece.size for piece in job.pieces), default=PAGE_BYTES)
        on_device = hashes and self.worker is Worker
        threads = min(workers, max(1, len(job.pieces)))
        return Tuning(threads, depth, buffers, min(chunk, largest), direct, hash_on_device=on_device, spin=in_memory and threads <= free)


def check_pieces(job: Job) -> None:
    """Raise `InvalidArgument` if a job contradicts itself."""
    ends = [file.size for file in job.files]
    known = len(job.checksums) if job.direction == "restore" else sys.maxsize
    for block, _, size, shard, position in job.pieces:
        if not 0 <= shard < len(ends) or position + size > ends[shard]:
            raise InvalidArgument(f"block {block} lies in no file of the job")
        if (position | size) % PAGE_BYTES or position < 0 or not 0 < size <= job.block_bytes:
            raise InvalidArgument(f"block {block} of {size} bytes at {position} is not a block of whole pages")
        if not 0 <= block < known:
            raise InvalidArgument(f"block {block} has no checksum")


def deadline(job: Job, otherwise: int) -> int:
    """Seconds in which something that is under way has to end.

    Raises:
        InvalidArgument: The option is no whole number, or out of its range.
    """
    return number_of(job, DEADLINE, otherwise, 1, 86400)


def choice(job: Job, name: str, values: Mapping[str, _Value]) -> _Value:
    """An option of a job that is a word; ``auto`` if it is not there.

    Raises:
        InvalidArgument: It is another word.
    """
    word = job.options.get(name, "auto")
    if word not in values:
        raise InvalidArgument(f"the option {name}={word!r} is neither of {', '.join(values)}")
    return values[word]


def number_of(job: Job, name: str, otherwise: int, least: int, most: int) -> int:
    """An option of a job that is a number.

    Raises:
        InvalidArgument: It is none, or too small or too large.
    """
    text = job.options.get(name, str(otherwise))
    if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
        raise InvalidArgument(f"the option {name}={text!r} is no whole number from {least} to {most}")
    return int(text)
