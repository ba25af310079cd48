"""A process that moves one image, and nothing else. It begins in `gms_core.snapshot.entry`.

It reads its order from standard input, tells its reports on standard output, and ends when standard input does: whoever started it is gone then, so
there is nobody to tell anything. It may be killed at any time: the kernel ends what is under way before the process is gone, its leases go with its
connection, and what it has written belongs to no snapshot yet.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from gms_core.client import connect
from gms_core.errors import GmsError, SnapshotBusy
from gms_core.snapshot import registry
from gms_core.snapshot.committed import committed
from gms_core.snapshot.engine import dedicate_process
from gms_core.snapshot.objects.urls import is_url
from gms_core.snapshot.orders import (
    COMMIT,
    Arrived,
    Begun,
    Done,
    Failed,
    Figures,
    Moving,
    Order,
    PullOrder,
    Report,
    RestoreOrder,
    SaveOrder,
    VerifyOrder,
    Waiting,
)
from gms_core.snapshot.reading import ImageSource, OpenSnapshot
from gms_core.snapshot.restore import restore_image, verify_image
from gms_core.snapshot.save import save_image
from gms_core.snapshot.shelves import open_shelf
from gms_core.snapshot.transfer import Moved, Transfer, TransferBackend

if TYPE_CHECKING:
    from gms_core.snapshot.peers.peer import Peer

log = logging.getLogger(__name__)

CLIENT = "gms snapshot"
TELL_S = 0.1
"""Seconds from one report of how far it is to the next."""


class Parent:
    """The process that gave the order.

    Args:
        reading: Descriptor that the order comes from. Once it ends, this process is killed.
        writing: Descriptor that reports go to.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._input = os.fdopen(reading, "rb", buffering=0)  # a thread that waits in a buffer at the end would abort the interpreter
        self._writing = writing
        self._lock = threading.Lock()
        self._may_commit = threading.Event()

    def order(self) -> Order:
        """Wait for the order; from then on, watch whether the parent is still there."""
        line = self._input.readline()
        threading.Thread(target=self._listen, name="gms-parent", daemon=True).start()
        order: Order = msgspec.json.decode(line, type=Order)
        return order

    def tell(self, report: Report) -> None:
        """Send a report. Safe from any thread."""
        line = msgspec.json.encode(report) + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._writing, line) :]

    def wait_for_commit(self) -> None:
        """Say that all is there, and wait until it may be published."""
        self.tell(Arrived())
        self._may_commit.wait()

    def _listen(self) -> None:
        while line := self._input.readline():
            if line == COMMIT:
                self._may_commit.set()
        os.kill(os.getpid(), signal.SIGKILL)


class Watcher:
    """Tells the parent how far a transfer is, until it is closed."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, transfer: Transfer, size: int) -> None:
        """Begin to tell."""
        self._parent.tell(Begun(size))
        self._thread = threading.Thread(target=self._run, args=(transfer,), name="gms-progress", daemon=True)
        self._thread.start()

    def _run(self, transfer: Transfer) -> None:
        while not self._ended.wait(TELL_S):
            self._parent.tell(Moving(transfer.poll()))
        self._parent.tell(Moving(transfer.poll()))

    def close(self) -> None:
        """Tell nothing more. Idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Callable[[Transfer, int], None]:
        return self.watch

    def __exit__(self, *_: object) -> None:
        self.close()


def carry_out(order: Order, parent: Parent) -> Done:
    """Do what was ordered.

    Raises:
        GmsError: It cannot be done; nothing of it is under way any more.
    """
    backend = registry.find(order.backend)  # the parent has asked whether it can be used here, which may take its time
    match order:
        case SaveOrder():
            with (
                connect(socket_path=Path(order.socket), client=CLIENT) as session,
                committed(session, order.pool) as lease,
                Watcher(parent) as watch,
            ):
                saved = save_image(
                    session, lease, order.target, order.index, backend, workers=order.workers, options=order.options, on_transfer=watch
                )
            return Done(_figures(saved.moved, saved.seconds, saved.kept_bytes), image=saved.image)
        case RestoreOrder():
            with _snapshot(order) as snapshot:
                return _restored(order, parent, snapshot, backend)
        case PullOrder():
            return _pulled(order, parent)
        case VerifyOrder():
            with _snapshot(order) as snapshot, Watcher(parent) as watch:
                moved = verify_image(snapshot, order.index, backend, workers=order.workers, options=order.options, on_transfer=watch)
            return Done(_figures(moved, {}))


def _restored(order: RestoreOrder | PullOrder, parent: Parent, images: ImageSource, backend: TransferBackend) -> Done:
    """Publish one image, once the parent says so."""
    with connect(socket_path=Path(order.socket), client=CLIENT) as session, Watcher(parent) as watch:
        restored = restore_image(
            session,
            images,
            order.index,
            backend,
            pool=order.pool,
            timeout_s=order.timeout_s,
            replace=order.replace,
            pin=order.pin,
            memory_timeout_s=order.memory_timeout_s,
            workers=order.workers,
            options=order.options,
            at_once=order.at_once,
            on_transfer=watch,
            on_wait=lambda reason: parent.tell(Waiting(reason)),
            before_commit=parent.wait_for_commit,
            on_hang=lambda error: _end_at_once(parent, error),
        )
        with restored.lease as lease:
            generation = lease.layout.generation
    return Done(_figures(restored.moved, restored.seconds), generation=generation)


def _end_at_once(parent: Parent, error: BaseException) -> NoReturn:
    """Tell why, and end with the session open: the kernel ends what is under way, and only then closes the connection that the draft hangs on."""
    _tell_failure(parent, error)
    logging.shutdown()
    while True:
        os.kill(os.getpid(), signal.SIGKILL)


def _tell_failure(parent: Parent, error: BaseException) -> None:
    if isinstance(error, GmsError):
        parent.tell(Failed(error.code, error.message, error.hint, error.details))
        return
    log.error("this image is not moved", exc_info=error)  # a fault of GMS, or of a plugin
    parent.tell(Failed(GmsError.code, f"{type(error).__name__}: {error}"))


def _pulled(order: PullOrder, parent: Parent) -> Done:
    """Publish what a peer has. Its modules take their time to load, which a restore does not have."""
    from gms_core.snapshot.backends.nixl_ucx import PeerBackend
    from gms_core.snapshot.peers.network import keep_to

    with _peer(order) as peer:
        keep_to(peer.here)
        return _restored(order, parent, peer, PeerBackend(peer.offer, order.index))


def _peer(order: PullOrder) -> Peer:
    """The peer that the parent has asked, connected."""
    from gms_core.snapshot.peers.handshake import address, read_secret
    from gms_core.snapshot.peers.peer import Peer

    peer = Peer(address(order.peer), read_secret(Path(order.secret)))
    if peer.manifest.id != order.id:
        peer.close()
        raise SnapshotBusy(f"{order.peer} serves something else than a moment ago", hint="Try again.")
    return peer


def _snapshot(order: RestoreOrder | VerifyOrder) -> OpenSnapshot:
    """The snapshot that the parent has looked at, open."""
    snapshot = open_shelf([root if is_url(root) else Path(root) for root in order.roots]).find(order.snapshot)
    if snapshot.manifest.id != order.id:
        snapshot.close()
        raise SnapshotBusy(f"snapshot {order.snapshot} is another one than a moment ago", hint="Try again.")
    return snapshot


def _figures(moved: Moved, around: Mapping[str, float], kept_bytes: int = 0) -> Figures:
    phases = {phase.name: phase.seconds for phase in moved.phases}
    return Figures(moved.bytes, moved.seconds, kept_bytes, phases, dict(around), tuple(moved.notes))


def main() -> int:
    """Carry out the one order. Returns the exit code."""
    writing = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no report
    parent = Parent(os.dup(0), writing)
    dedicate_process()
    try:
        parent.tell(carry_out(parent.order(), parent))
    except Exception as error:  # noqa: BLE001 - the root of the process: whoever started it is told
        _tell_failure(parent, error)
        return 1
    return 0
