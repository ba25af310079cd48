"""Sentinels: files by which an orchestrator sees how far a save or a restore is. Their directory can be on another volume than the snapshots.

In ``DIRECTORY/NAME`` there is one file for what goes on, or has ended: ``SAVING``, then ``SAVED`` or ``FAILED``; ``RESTORING``, then ``RESTORED`` or
``FAILED``. Each is JSON, appears whole, and says which snapshot it is about. When something begins, what an earlier one has left is removed first; an
end is there before ``SAVING`` or ``RESTORING`` is removed. A restore leaves ``SAVED`` where it is, for others wait for it. Everybody may read them:
who watches is seldom the user that saves, and they hold no weights.

The snapshot's own ``COMMITTED`` decides whether it exists. A sentinel that cannot be written stops nothing and holds nothing up for long, but it is
not passed over: `Control.close` tells, and a command ends with an exit code that says so.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from gms_core.errors import GmsError, SnapshotBusy, TransferFailed
from gms_core.snapshot.folders import Folder, explained, give_mode
from gms_core.snapshot.on_disk import Failure, check_name, failure

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""Seconds for which a volume that does not answer is waited for, each time."""

State = Literal["SAVING", "SAVED", "RESTORING", "RESTORED", "FAILED"]
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644


class Sentinel(msgspec.Struct, frozen=True):
    """What the file of a state holds.

    Attributes:
        state: Its name.
        name: The snapshot's name.
        version: Its version; 0 while that is not known.
        id: Its id; empty while that is not known.
        at: When, as RFC 3339 in UTC.
        host: The machine that does it.
        pid: The process that does it.
        doing: ``save`` or ``restore``.
        code: Of the error, if it failed.
        message: Of the error.
        hint: Of the error.
    """

    state: State
    name: str
    version: int
    id: str
    at: str
    host: str
    pid: int
    doing: Literal["save", "restore"]
    code: str = ""
    message: str = ""
    hint: str = ""


class Control:
    """The sentinels of one save or restore.

    Args:
        directory: Where; it is made if it is not there. None for no sentinels.
        name: The snapshot's name.
        doing: What is done.
    """

    def __init__(self, directory: Path | None, name: str, doing: Literal["save", "restore"]) -> None:
        check_name(name)
        self._directory = directory
        self._name = name
        self._doing: Literal["save", "restore"] = doing
        self._version, self._id = 0, ""
        self._begun = self._ended = False
        self._problem: GmsError | None = None
        self._lock: int | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> GmsError | None:
        """Why a file could not be written; None if all were, so far."""
        return self._problem

    def alone(self) -> None:
        """Keep other saves from telling of the name in this directory until `close`: for those that nothing else keeps apart.

        Raises:
            SnapshotBusy: One does it already.
        """
        busy: list[SnapshotBusy] = []
        directory = self._directory
        if directory is None:
            return

        def work() -> None:
            try:
                self._lock = _lock(directory, self._name)
            except SnapshotBusy as error:
                busy.append(error)
            except (GmsError, OSError) as problem:  # whoever writes there is told
                log.info("sentinels of snapshot %s in %s are not locked: %s", self._name, directory, problem)

        self._do(work)
        if busy:
            raise busy[0]

    def begin(self) -> None:
        """Say that it has begun; what an earlier one has left is gone then."""
        self._begun = True
        self._enter("SAVING" if self._doing == "save" else "RESTORING")

    def about(self, version: int, identifier: str) -> None:
        """From now on, say which snapshot it is about."""
        self._version, self._id = version, identifier

    def done(self) -> None:
        """Say that it has ended well."""
        self._ended = True
        self._enter("SAVED" if self._doing == "save" else "RESTORED")

    def fail(self, error: BaseException) -> None:
        """Say that it has failed, and why. Nothing after `done`, nor if another one is at work: the sentinels are that one's."""
        if not self._ended and (self._begun or not isinstance(error, SnapshotBusy)):
            self._ended = True
            self._enter("FAILED", error)

    def close(self) -> GmsError | None:
        """Wait for the last file, but not for long.

        Returns:
            Why a file could not be written; None if all were.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._work.put(None)
            thread.join(PATIENCE_S)
            if thread.is_alive() and self._problem is None:
                self._problem = self._unanswered()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        return self._problem

    def _enter(self, state: State, error: BaseException | None = None) -> None:
        if self._directory is None:
            return
        at = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        why = Failure("", "") if error is None else failure(error, at)
        sentinel = Sentinel(
            state, self._name, self._version, self._id, at, socket.gethostname(), os.getpid(), self._doing, why.code, why.message, why.hint
        )
        directory = self._directory

        def work() -> None:
            try:
                write_sentinel(directory, sentinel)
            except (GmsError, OSError) as problem:
                self._problem = problem if isinstance(problem, GmsError) else TransferFailed(f"{directory}: {problem}")
                log.warning("sentinel %s of snapshot %s is not written: %s", state, self._name, problem)

        self._do(work)

    def _do(self, work: Callable[[], None]) -> None:
        """Have the thread do something, and wait for that, but not for long."""
        if self._thread is None:
            # A daemon: a volume that never answers must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="gms-control", daemon=True)
            self._thread.start()
        done = threading.Event()

        def tell() -> None:
            try:
                work()
            finally:
                done.set()

        self._work.put(tell)
        if not done.wait(PATIENCE_S):
            self._problem = self._unanswered()
            log.warning("%s", self._problem)

    def _unanswered(self) -> GmsError:
        return TransferFailed(
            f"the control directory {self._directory} does not answer", hint="The snapshot does not depend on it; look at the volume that it is on."
        )

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.fail(error)
        self.close()


def write_sentinel(directory: Path, sentinel: Sentinel) -> None:
    """Write a sentinel for good, and remove those of other states: before it, if something begins, else after it."""
    begins = sentinel.state in ("SAVING", "RESTORING")
    own: tuple[State, ...] = ("SAVING", "SAVED", "FAILED") if sentinel.doing == "save" else ("RESTORING", "RESTORED", "FAILED")
    others = [state for state in own if state != sentinel.state]
    with _folder(directory, sentinel.name) as folder:
        for state in others if begins else ():
            folder.unlink(state)
        folder.write(sentinel.state, msgspec.json.format(msgspec.json.encode(sentinel), indent=1) + b"\n", _FILE_MODE)
        for state in () if begins else others:
            folder.unlink(state)


@contextlib.contextmanager
def _folder(directory: Path, name: str) -> Iterator[Folder]:
    """Where the sentinels of a name are. It is made if it is not there."""
    with explained("made", directory):
        is_new = not directory.is_dir()
        directory.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    with Folder.open(directory) as top, top.make(name, _FOLDER_MODE) as folder:
        if is_new:
            give_mode(top.descriptor, _FOLDER_MODE)
        yield folder


def _lock(directory: Path, name: str) -> int:
    """Lock the folder of a name itself, so that nothing more is in it. Returns a descriptor that has the lock.

    Raises:
        SnapshotBusy: Another save has it.
        OSError: The file system locks no folders.
    """
    with _folder(directory, name) as folder:
        descriptor = os.dup(folder.descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SnapshotBusy(
            f"another save tells of snapshot {name!r} in {directory}", hint="Give each save that goes on at the same time a --control-dir of its own."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
