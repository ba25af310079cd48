"""An elector: takes a lock for the engine that has started it, renews it, and kills the engine before anybody else could have it.

It tells the engine what it does, and obeys one order: to release. The engine's end is seen by a descriptor of its process, whatever becomes of the
pipes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

import msgspec

from gms_core.client import connect
from gms_core.errors import GmsError
from gms_core.failover.elector.address import EtcdAddress, StoreAddress, parse
from gms_core.failover.elector.protocol import RELEASE, Elected, Order, Over, Refused, Renewed, Told, Trouble, Waits, now
from gms_core.failover.elector.store import Candidate, LockStore
from gms_core.failover.elector.talker import Fact, Gone, Had, Impossible, Talker, Unknown, Waiting
from gms_core.failover.elector.validity import Validity

log = logging.getLogger(__name__)

LOOK_S = 0.01
"""Seconds between two looks at whether the processes of an engine are gone."""
CONNECT_S = 1.0
_LONGEST_ORDER = 65536


def open_store(address: StoreAddress, candidate: Candidate) -> LockStore:
    """The lock that an address names, for a candidate."""
    if isinstance(address, EtcdAddress):
        from gms_core.failover.elector.etcd import EtcdStore

        return EtcdStore(address, candidate)
    from gms_core.failover.elector.k8s import K8sStore

    return K8sStore(address, candidate, now)


class Elector:
    """One engine's elector."""

    def __init__(self, order: Order, store: LockStore, ttl_s: float) -> None:
        self._order = order
        self._store = store
        self._ttl_s = ttl_s
        self._facts: queue.SimpleQueue[Fact] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._talker = Talker(store, ttl_s, now, self._hear)
        self._validity: Validity | None = None
        self._said: Told | None = None

    def run(self) -> None:
        """Do it, until the engine has ended or has given the lock back."""
        self._talker.start()
        poll = select.poll()
        for descriptor in (self._order.process, self._wake, sys.stdin.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll(self._patience_ms())]
            if self._order.process in ready:
                self._engine_ended()
                return
            if sys.stdin.fileno() in ready:
                if os.read(sys.stdin.fileno(), len(RELEASE)) == RELEASE:
                    self._release()
                    return
                poll.unregister(sys.stdin.fileno())  # the engine's end of it is closed, and nothing more will come
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if reason := self._reason_to_end():
                self._end(reason)
                return
            if isinstance(self._said, Refused):
                return

    def _hear(self, fact: Fact) -> None:
        self._facts.put(fact)
        os.eventfd_write(self._wake, 1)

    def _patience_ms(self) -> float | None:
        return None if self._validity is None else max(0.0, self._validity.ends_at - now()) * 1000 + 1

    def _reason_to_end(self) -> str:
        """Take in what was heard; returns why the engine must not go on, if that is so."""
        trouble = ""
        while not self._facts.empty():
            fact = self._facts.get()
            match fact:
                case Had(term, asked_at):
                    trouble = ""
                    if self._validity is None:
                        self._validity = Validity(self._ttl_s, asked_at)
                        self._tell(Elected(term, self._validity.ends_at))
                    elif self._validity.has_ended(now()):  # it is too late for this answer: others may have been told that the engine has ended
                        break
                    else:
                        self._validity.renewed(asked_at)
                        self._tell(Renewed(self._validity.ends_at))
                case Waiting(reason):
                    self._tell(Waits(reason))
                case Unknown(reason):
                    trouble = reason
                    self._tell(Trouble(reason))
                case Gone():
                    return "its lock was given to somebody else, or deleted"
                case Impossible(error):
                    self._tell(Refused(error.code, error.message, error.hint))
        if self._validity is not None and self._validity.has_ended(now()):
            return f"its lock was last renewed {now() - self._validity.renewed_at:.1f} s ago{trouble and ': '}{trouble}"
        return ""

    def _tell(self, told: Told) -> None:
        if told == self._said:
            return
        self._said = told
        tell(told)

    def _end(self, reason: str) -> None:
        """Kill the engine: its server kills the processes that are left, as whenever one has died."""
        self._tell(Over(reason))
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._order.process, signal.SIGKILL)
        log.error("%s (pid %d) was killed: %s", self._order.engine, self._order.pid, reason)
        self._engine_ended()

    def _engine_ended(self) -> None:
        """The process that asked for the lock is ending: release it once all of the engine's processes are gone, or let it run out."""
        stopped = self._talker.stop(self._ttl_s)
        self._reason_to_end()  # the lock may have been taken in this moment
        select.select([self._order.process], [], [])
        if self._validity is None or not stopped:
            return
        while now() < self._validity.runs_out_at:
            if self._is_gone():
                self._release()
                return
            time.sleep(LOOK_S)

    def _is_gone(self) -> bool:
        """Whether the servers know of no process of this engine any more."""
        try:
            for path in self._order.sockets:
                with connect(socket_path=Path(path), client=f"elector of {self._order.engine}", timeout_s=CONNECT_S) as session:
                    if any(cohort.name == self._order.cohort for cohort in session.status().cohorts):
                        return False
        except GmsError:
            return False
        return True

    def _release(self) -> None:
        if not self._talker.stop(self._ttl_s) or self._validity is None:
            return
        try:
            self._store.release()
        except GmsError as error:
            log.warning("the lock of %s could not be released, and runs out by itself: %s", self._order.engine, error)


def main() -> None:
    """Read the order, and carry it out."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends after its engine, whoever ends that
    os.set_blocking(sys.stdout.fileno(), False)  # an engine that is stopped reads nothing, and must not stop its elector
    order = msgspec.json.decode(_line(), type=Order)
    address = parse(order.lock)
    candidate = Candidate(order.engine, order.cohort, order.pid, socket.gethostname(), uuid.uuid4().hex)
    try:
        store = open_store(address, candidate)
    except GmsError as error:
        tell(Refused(error.code, error.message, error.hint))
        return
    with contextlib.closing(store):
        Elector(order, store, address.ttl_s).run()


def tell(told: Told) -> None:
    """Say something to the engine, if it is there and listens; a line is said whole or not at all."""
    with contextlib.suppress(OSError):  # that it is not there is seen elsewhere
        os.write(sys.stdout.fileno(), msgspec.json.encode(told) + b"\n")


def _line() -> bytes:
    """The first line of standard input, and nothing of what comes after it."""
    line = b""
    while len(line) < _LONGEST_ORDER and (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
        line += byte
    return line
