"""One client: does one thing after the other, chosen by a seed, until a file is there, and says each answer with the times around it.

    python worker.py SOCKET NAME SEED END PAUSE_S

SIGUSR1 has it tear a connection of its own: at once, in the middle of its next request, between that and the reply, or in the middle of a reply.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gms_core.client import Membership, PoolGenerations, RetainedPool, Session, WriteLease, connect
from gms_core.errors import (
    AcquireTimeout,
    ConnectionLost,
    GenerationConflict,
    GenerationNotFound,
    GmsError,
    IdentityMismatch,
    InvalidArgument,
    JournalUnavailable,
    LeaseConflict,
    OutOfMemory,
    PoolNotFound,
    SessionClosed,
)
from gms_core.layout import Identity
from gms_core.protocol import channel as channels
from gms_core.protocol.observation import EventBatch, Events
from gms_core.vmm.driver import Access

MODEL = Identity({"content": "abc"})
PAGE = 4096
PATIENCE_S = 60.0
LARGE = 600_000
"""Letters that make a manifest large: what is reserved in the journal is not enough for it, so that the disk has to have room."""
HELD_S = 0.3
"""Seconds for which an engine that was cut off looks at its memory, if nobody ends it: the server does."""

Send = Callable[..., int]
Receive = Callable[..., tuple[bytes, list[int]]]


class Tear:
    """Cuts connections of this process, from within: that is the one place from which it can be done at a certain byte."""

    def __init__(self, chance: random.Random, on_tear: Callable[[], None]) -> None:
        self.sessions: list[Session] = []
        self._chance, self._on_tear = chance, on_tear
        self._next = ""
        self._send: Send = channels.send
        self._receive: Receive = channels.receive
        channels.send, channels.receive = self._sent, self._received  # type: ignore[assignment]
        signal.signal(signal.SIGUSR1, lambda *_: self._order())

    def begin_anew(self, chance: random.Random) -> None:
        """In a forked child: what its parent was told to do is not for the child."""
        self.sessions, self._chance, self._next = [], chance, ""

    def _order(self) -> None:
        self._next = self._chance.choice(["now", "in a request", "before the reply", "in a reply"])
        if self._next == "now":
            for session in self.sessions:
                self._cut(session._channel._socket)

    def _cut(self, connection: socket.socket) -> None:
        self._next = ""
        self._on_tear()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _sent(self, connection: socket.socket, data: memoryview, *descriptors: tuple[int, ...]) -> int:
        if self._next == "in a request":
            self._send(connection, data[: self._chance.randrange(1, max(2, len(data)))], *descriptors)
            self._cut(connection)
            return len(data)
        taken = self._send(connection, data, *descriptors)
        if self._next == "before the reply" and taken == len(data):
            self._cut(connection)
        return taken

    def _received(self, connection: socket.socket) -> tuple[bytes, list[int]]:
        data, descriptors = self._receive(connection)
        if self._next == "in a reply" and data:
            self._cut(connection)
            return data[: self._chance.randrange(1, max(2, len(data)))], descriptors
        return data, descriptors


class Worker:
    """What one client does.

    Args:
        path: The server's socket.
        name: Of the client.
        seed: Of whatever is left to chance.
    """

    def __init__(self, path: Path, name: str, seed: int) -> None:
        self.path, self.name, self.seed = path, name, seed
        self.chance = random.Random(seed)
        self.engines = 0
        self.events, self.last_event = "", 0
        self.tear = Tear(random.Random(seed + 1), lambda: self.say("torn", time.monotonic()))
        self.session = self.connected(name)
        self.tear.sessions = [self.session]

    def say(self, kind: str, began: float, **facts: object) -> None:
        """Tell what was done, in one call of the kernel: a kill, or the signal that tears, leaves no half of a line."""
        event = {"client": self.name, "pid": os.getpid(), "kind": kind, "began": began, "ended": time.monotonic(), **facts}
        os.write(1, json.dumps(event).encode() + b"\n")

    def connected(self, client: str) -> Session:
        """A new session; one that cannot be written down is asked for again."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            began = time.monotonic()
            try:
                return connect(socket_path=self.path, client=client, timeout_s=PATIENCE_S)
            except (JournalUnavailable, ConnectionLost) as error:
                self.tell_of(error, began)
                if began > deadline:
                    raise
                time.sleep(0.01)

    def tell_of(self, error: GmsError, began: float) -> None:
        """Tell of a request that came to nothing; whether it had a cause is seen by who knows of all faults."""
        if isinstance(error, ConnectionLost | SessionClosed):
            self.say("lost", began, error=str(error))
        else:
            self.say("refused", began, code=error.code)

    def reconnect(self) -> None:
        self.session.close()
        self.session = self.connected(self.name)
        self.tear.sessions = [self.session]

    def publish(self) -> None:
        session = self.session
        asked = time.monotonic()
        wait_s = self.chance.choice([0.0, 0.3, 30.0])
        lease = session.acquire("weights", "rw", MODEL, timeout_s=PATIENCE_S, slab_bytes=4 * PAGE, memory_timeout_s=wait_s)
        assert isinstance(lease, WriteLease)
        self.say("has", asked, what="generation", number=lease.generation)
        content = b""
        try:
            for _ in range(self.chance.randint(1, 6)):
                part = os.urandom(self.chance.randint(1, 8 * PAGE))
                began = time.monotonic()
                offset = lease.arena.allocate(len(part), alignment=1)
                session.driver.write(lease.arena.address(offset), part)
                content += part
        except OutOfMemory as error:
            self.tell_of(error, began)
            self.say("leaves", time.monotonic(), what="generation")
            lease.release()
            return
        if self.chance.random() < 0.2:
            self.say("leaves", time.monotonic(), what="generation")
            lease.release()
            self.say("gave up", asked)
            return
        digest = hashlib.sha256(content).hexdigest()
        manifest = json.dumps([len(content), digest, "x" * (LARGE if self.chance.random() < 0.3 else 0)]).encode()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            asked = time.monotonic()
            self.say("leaves", asked, what="generation")
            try:
                read = lease.commit(manifest, MODEL)
            except (JournalUnavailable, OutOfMemory) as error:  # nothing was published, and the draft is as it was
                self.tell_of(error, asked)
                if asked > deadline:
                    raise
                self.say("has", asked, what="generation", number=lease.generation)
                time.sleep(0.02)
                continue
            break
        self.say("published", asked, generation=read.layout.generation, digest=digest)
        read.release()

    def attach(self) -> None:
        session, chance = self.session, self.chance
        began = time.monotonic()
        lease = session.acquire("weights", chance.choice(["ro", "auto"]), MODEL, timeout_s=PATIENCE_S, slab_bytes=4 * PAGE)
        if isinstance(lease, WriteLease):
            lease.release()
            return
        base = lease.map(64 * PAGE).base

        def look(began: float) -> None:
            size, digest, _ = json.loads(lease.layout.manifest)
            found = hashlib.sha256(session.driver.read(base, size)).hexdigest()
            self.say("read", began, generation=lease.layout.generation, digest=found, said=digest)

        if chance.random() < 0.3:
            lease.unmap()
            session.status()
            lease.remap()
        look(began)
        while chance.random() < 0.5:
            time.sleep(chance.uniform(0, 0.2))
            began = time.monotonic()
            lease.move()
            assert lease.arena is not None
            assert lease.arena.base == base
            look(began)
        lease.release()

    def undo(self) -> None:
        """Bring an older generation back. The lease keeps it as well, since another client may unpin what both have pinned."""
        lease = self.session.acquire("weights", "auto", MODEL, timeout_s=PATIENCE_S, slab_bytes=4 * PAGE)
        if isinstance(lease, WriteLease):
            lease.release()
            return
        pool, older = PoolGenerations(self.session, "weights"), lease.layout
        pool.pin(older.generation)
        try:
            newer = pool.await_newer(older.generation, 1.0)
            began = time.monotonic()
            new = pool.rollback(older.generation, expected=newer.generation)
            self.say("published", began, generation=new, digest=json.loads(older.manifest)[1])
        except (AcquireTimeout, GenerationConflict):
            self.say("gave up", time.monotonic())
        pool.unpin(older.generation)
        lease.release()

    def look(self) -> None:
        began = time.monotonic()
        report = self.session.status()
        batch = self.session.ask(Events(self.events, self.last_event, 0.0), EventBatch)
        if batch.log == self.events and batch.last < self.last_event:
            raise AssertionError(f"event {batch.last} came after {self.last_event}")
        self.events, self.last_event = batch.log, batch.last
        self.say("looked", began, allocations=report.allocations, events=len(batch.events))

    def visit(self) -> None:
        """Open some sessions, all at once or one after the other, and close them."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            for _ in range(self.chance.randint(1, 10)):
                visitor = stack.enter_context(self.connected(f"{self.name} visitor"))
                if self.chance.random() < 0.5:
                    visitor.close()
        self.say("visited", began)

    def ask_wrongly(self) -> None:
        """Ask for what nobody gets: it has to be refused, and nothing else happens."""
        began, pool = time.monotonic(), PoolGenerations(self.session, "weights")
        wrong: list[Callable[[], object]] = [
            lambda: self.session.acquire("weights", "ro", Identity({"content": "other"}), timeout_s=0.0),
            lambda: self.session.acquire("no/pool", "ro", MODEL, timeout_s=0.0),
            lambda: pool.drop(10**9),
            lambda: pool.rollback(10**9, expected=10**9),
            lambda: RetainedPool(self.session, "kv").hold(0.0),
        ]
        try:
            self.chance.choice(wrong)()
        except (AcquireTimeout, GenerationConflict, GenerationNotFound, IdentityMismatch, InvalidArgument, LeaseConflict, PoolNotFound) as error:
            self.say("asked wrongly", began, error=error.code)
        else:
            raise AssertionError("what nobody gets was granted")

    def serve(self) -> None:
        """An engine of one process: elected, it holds the memory, and dies without a word or leaves in order."""
        self.engines += 1
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            return
        self.name = f"{self.name} engine {self.engines}"
        self.chance = random.Random(self.seed * 1000 + self.engines)
        self.tear.begin_anew(self.chance)
        began = time.monotonic()
        try:
            self.engine()
        except (ConnectionLost, SessionClosed, JournalUnavailable, OutOfMemory) as error:
            self.tell_of(error, began)
        except BaseException:  # noqa: BLE001 - it is told, and the process ends
            self.say("failed", began, error=traceback.format_exc()[-1500:])
        os._exit(0)

    def engine(self) -> None:
        own = self.connected(self.name)
        self.tear.sessions = [own]
        cohort = self.name.replace(" ", "-")
        member = Membership.join(own, cohort, cohort, "rank 0")
        began = time.monotonic()
        term = member.elect("primary", 120.0)
        self.say("has", began, what="term", number=term)
        pool = RetainedPool(own, "kv")
        if pool.plan(Identity({"kind": "kv"}), PATIENCE_S) is None:
            pool.provide(b"plan", [2 * PAGE, PAGE], 30.0)
        assert pool.planned is not None
        began = time.monotonic()
        held = pool.hold(PATIENCE_S)
        self.say("has", began, what="epoch", number=held.epoch)
        base = own.driver.reserve(3 * PAGE)
        at = {allocation.id: allocation.offset for allocation in pool.planned.allocations}

        def take(received: Any) -> None:
            for item in received:
                own.driver.map(base + at[item.id], item.size, own.driver.import_descriptor(item.descriptor, item.size))

        pool.receive(take)
        own.driver.set_access(base, 3 * PAGE, Access.READ_WRITE)
        before = int.from_bytes(own.driver.read(base, 8), "little")
        own.driver.write(base, held.epoch.to_bytes(8, "little"))

        def look() -> None:
            after = int.from_bytes(own.driver.read(base, 8), "little")
            self.say("held", began, epoch=held.epoch, before=before, after=after)
            if after != held.epoch:
                os._exit(0)

        try:
            time.sleep(self.chance.uniform(0, 0.1))
            own.status()
        except (ConnectionLost, SessionClosed) as error:
            # Whoever is granted the memory now must not have it before this process is gone, which the server sees to.
            self.tell_of(error, began)
            until = time.monotonic() + HELD_S
            while time.monotonic() < until:
                if int.from_bytes(own.driver.read(base, 8), "little") != held.epoch:
                    look()
                time.sleep(0.001)
        look()
        self.say("leaves", time.monotonic(), what="epoch")
        self.say("leaves", time.monotonic(), what="term")
        if self.chance.random() < 0.3:
            member.depart(10.0)

    def run(self, end: Path, pause_s: float) -> None:
        """Do one thing after the other until the file is there."""
        actions = [self.serve]
        if self.name.startswith("all"):
            actions = [self.publish, self.attach, self.attach, self.attach, self.undo, self.look, self.visit, self.ask_wrongly, self.serve]
        while not end.exists():
            began = time.monotonic()
            try:
                self.chance.choice(actions)()
                time.sleep(self.chance.uniform(0, 2 * pause_s))
            except (ConnectionLost, SessionClosed, JournalUnavailable, OutOfMemory) as error:
                self.tell_of(error, began)
                self.reconnect()
            except Exception:  # noqa: BLE001 - it is told, and is a finding
                self.say("failed", began, error=traceback.format_exc()[-1500:])
                self.reconnect()


if __name__ == "__main__":
    Worker(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).run(Path(sys.argv[4]), float(sys.argv[5]))
