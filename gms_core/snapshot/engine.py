"""The engine of GMS's own backends: threads, each with its own buffers, that share queues of blocks.

The first error ends the whole job. Whichever thread is the last gives everything up, so a transfer that is cancelled leaves nothing behind even if
nobody waits for its end.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gms_core.errors import DriverError, TransferCancelled, TransferFailed
from gms_core.snapshot.buffers import Buffer, Ring
from gms_core.snapshot.chunks import Channel, OpenFiles
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.transfer import Direct, Job, Memory, Moved, Phase
from gms_core.snapshot.worker import Orders, Worker
from gms_core.vmm.undo import UndoStack

_kept: list[object] = []
"""What transfers have not given up, since something may still be written there. It stays to the end of the process."""


class Tuning(NamedTuple):
    """How much goes on at once.

    Attributes:
        workers: Threads.
        depth: Reads or writes that a thread has under way at once.
        buffers: Of each thread.
        chunk_bytes: Read or written at once, at most.
        direct: Whether to go past the page cache.
        in_order: Whether each file is moved by one thread alone, from its begin to its end.
        hash_on_device: Whether a device that can finds the checksums when restoring.
        spin: Whether threads keep their cores while they wait for copies.
    """

    workers: int
    depth: int
    buffers: int
    chunk_bytes: int
    direct: Direct = "auto"
    in_order: bool = False
    hash_on_device: bool = True
    spin: bool = False


class Route(Protocol):
    """A backend's way between a job's files and buffers, which its threads share."""

    def channel(self, buffers: Sequence[Buffer]) -> Channel:
        """Open the calling thread's channel; these buffers are its own.

        Raises:
            TransferFailed: The kernel refuses.
        """

    def notes(self) -> list[str]:
        """What a user should know of how it went."""

    def close(self) -> None:
        """Give up what it has, once all channels are closed."""


class _Queues:
    """What is left to do. Each root has a queue, and each thread a root; one whose root has no more helps where most is left."""

    def __init__(self, job: Job) -> None:
        roots = [file.root for file in job.files]
        found: dict[str, deque[Piece]] = {}
        for piece in job.pieces:
            found.setdefault(roots[piece.shard], deque()).append(piece)
        self._left = list(found.values())

    def take(self, home: int) -> Piece | None:
        """The next block. Taking from a deque is atomic, so no lock is held."""
        if not self._left:
            return None
        queue = self._left[home % len(self._left)]
        while True:
            try:
                return queue.popleft()
            except IndexError:
                queue = max(self._left, key=len)
                if not queue:
                    return None


class _WholeFiles:
    """What is left to do, where each file is one thread's from its begin to its end."""

    def __init__(self, job: Job) -> None:
        found: dict[int, deque[Piece]] = {}
        for piece in job.pieces:
            found.setdefault(piece.shard, deque()).append(piece)
        self._left = deque(found.values())
        self._begun: dict[int, deque[Piece]] = {}

    def take(self, home: int) -> Piece | None:
        """The next block of the thread's file, or the first one of a file that nobody has begun."""
        if not self._begun.get(home):
            try:
                self._begun[home] = self._left.popleft()
            except IndexError:
                return None
        return self._begun[home].popleft()


class StagedTransfer:
    """A job that is under way. See `Transfer`.

    Attributes:
        is_quiet: See `Transfer.finish`.

    Args:
        job: What to move.
        memory: Where to, or from.
        files: The job's, open; they are closed at the end.
        route: How the backend gets at them; closed at the end.
        tuning: How much goes on at once.
        worker: What a thread does with its orders.

    Raises:
        TransferFailed: The machine has no room for the buffers.
    """

    def __init__(self, job: Job, memory: Memory, files: OpenFiles, route: Route, tuning: Tuning, worker: type[Worker] = Worker) -> None:
        self._memory, self._files, self._route = memory, files, route
        self._pinning = threading.Lock()
        self._is_pinned = self._tried_to_pin = False
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._notes: list[str] = []
        self._left = _WholeFiles(job) if tuning.in_order else _Queues(job)
        self._began = time.perf_counter()
        if job.direction == "restore" and tuning.hash_on_device:
            memory.prepare_hash(job.block_bytes)
        self._lanes = [memory.lane(spin=tuning.spin) for _ in range(tuning.workers)]
        self._ring = Ring(tuning.workers * tuning.buffers, tuning.chunk_bytes)
        self._workers = [
            worker(
                Orders(
                    job=job,
                    files=files,
                    take=functools.partial(self._left.take, number),
                    check=self._check,
                    channel=route.channel,
                    lane=lane,
                    places=memory.places,
                    buffers=self._ring.buffers[number * tuning.buffers :][: tuning.buffers],
                    pin=self._pin,
                    depth=tuning.depth,
                    chunk_bytes=tuning.chunk_bytes,
                    hash_on_device=tuning.hash_on_device,
                )
            )
            for number, lane in enumerate(self._lanes)
        ]
        self._threads: list[threading.Thread] = []
        self._running = len(self._workers)
        self._unclaimed = set(range(self._running))
        self._done = threading.Event()
        self._cleaned = 0.0
        self.is_quiet = True
        try:
            self._start()
        except BaseException:
            self.cancel()
            self._call_off()
            self._join()
            raise

    def poll(self) -> int:
        """See `Transfer.poll`."""
        return sum(worker.moved for worker in self._workers)

    def finish(self) -> Moved:
        """See `Transfer.finish`. An interrupt ends the job early too, and is raised once nothing of it is under way."""
        self._join()
        if self._error is not None:
            raise self._error
        seconds: defaultdict[str, float] = defaultdict(float)
        checksums: dict[int, int] = {}
        for worker in self._workers:
            checksums.update(worker.checksums)
            for name, spent in worker.seconds.items():
                seconds[name] += spent
        ended = max(worker.ended for worker in self._workers)
        seconds["clean"] = self._cleaned - ended
        notes = [*self._notes, *sorted(set[str]().union(*(worker.notes for worker in self._workers)))]
        phases = tuple(Phase(name, spent) for name, spent in sorted(seconds.items()))
        return Moved(self.poll(), ended - self._began, checksums, phases, tuple(notes))

    def cancel(self) -> None:
        """See `Transfer.cancel`."""
        self._fail(TransferCancelled("the transfer was cancelled"))

    def _join(self) -> None:
        """Wait for the threads. An interrupt does not end the wait, only the job.

        Joining them is not enough: a join that is interrupted takes its thread for ended, which the next join believes (Python 3.11, bpo-45274).
        """
        interrupt: BaseException | None = None
        while True:
            try:
                if interrupt is not None:
                    self.cancel()
                self._done.wait()
                for thread in self._threads:
                    thread.join()
                break
            except BaseException as error:  # noqa: BLE001 - raised below, once no thread touches the memory any more
                interrupt = interrupt or error
        if interrupt is not None:
            raise interrupt

    def _start(self) -> None:
        for number in range(len(self._workers)):
            # Daemons: a transfer that nobody ends must not keep the interpreter from exiting.
            thread = threading.Thread(target=self._run, args=(number,), name=f"gms-transfer-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._fail(TransferFailed(f"thread {number + 1} of {len(self._workers)} cannot be started: {error}", hint="Use fewer threads."))
                self._call_off()
                return
            self._threads.append(thread)

    def _call_off(self) -> None:
        """Have no more threads begin."""
        for number in range(len(self._workers)):
            if self._claim(number):
                self._leave()

    def _run(self, number: int) -> None:
        if not self._claim(number):
            return
        try:
            self._workers[number].run()
        except BaseException as error:  # noqa: BLE001 - the root of a thread: `finish` raises it
            self._fail(error)
        self._leave()

    def _claim(self, number: int) -> bool:
        """Whether it is the caller that has to say when a worker has ended. An interrupt leaves open whether a thread was started."""
        try:
            self._unclaimed.remove(number)
        except KeyError:
            return False
        return True

    def _check(self) -> None:
        if self._error is not None:
            raise TransferCancelled("another part of the transfer has failed, or it was cancelled")

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and (self._running or not isinstance(error, TransferCancelled)):
                self._error = error
        for lane in self._lanes:
            lane.abandon()

    def _pin(self) -> None:
        """Make the buffers fit for copies, once. Done late: pinning and mapping memory hold each other up in the driver."""
        if self._tried_to_pin:
            return
        with self._pinning:
            if self._tried_to_pin:
                return
            try:
                self._memory.register(self._ring.address, self._ring.size)
                self._is_pinned = True
            except DriverError as error:
                self._notes.append(f"host buffers could not be pinned, so copies are slow: {error.message}")
            self._tried_to_pin = True

    def _leave(self) -> None:
        """A thread has ended; the last one cleans up."""
        with self._lock:
            self._running -= 1
            if self._running:
                return
        try:
            self._notes += [*self._files.notes(), *self._route.notes()]
            self._give_up()
        except Exception as error:  # noqa: BLE001 - the root of a thread: `finish` raises it
            self.is_quiet = False
            self._fail(error)
        finally:
            self._cleaned = time.perf_counter()
            self._done.set()

    def _give_up(self) -> None:
        with UndoStack() as undo:
            undo.push(self._files.close)
            if not all(worker.released for worker in self._workers):
                self.is_quiet = False
                _kept.append((self._memory, self._ring, self._route))
                return  # a device, or the kernel, may still write there: rather a leak
            undo.push(self._route.close)
            if self._is_pinned:
                self._memory.unregister(self._ring.address)
            self._ring.close()


def dedicate_process() -> None:
    """Tune this process for a transfer alone: a thread whose read has ended gets the interpreter's lock within half a millisecond.

    For a process that does nothing else, such as a command: where other threads compute in Python, they and the transfer would hold each other up.
    """
    sys.setswitchinterval(0.0005)
