"""A connection to a device server, and the requests that go over it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from gms_core import __version__, death_notice
from gms_core.client.arena import Received, Take, round_up
from gms_core.client.dial import Answer, accepted, check_known, final, greet_next, in_the_time_left, resume
from gms_core.client.lease import ReadLease, WriteLease
from gms_core.client.watch import watch
from gms_core.config import settings
from gms_core.devices import DeviceId
from gms_core.errors import (
    ConnectionLost,
    ForkedSession,
    GmsError,
    InvalidArgument,
    ProtocolError,
    SessionClosed,
    VersionMismatch,
)
from gms_core.layout import Identity
from gms_core.protocol.channel import Channel
from gms_core.protocol.framing import close_descriptors
from gms_core.protocol.messages import (
    PROTOCOL_VERSIONS,
    Acquire,
    Allocate,
    Commit,
    Descriptors,
    Done,
    Export,
    Hello,
    Join,
    Joined,
    Message,
    Mode,
    ReadGranted,
    Release,
    Status,
    StatusReport,
    Welcome,
    WillNotify,
    WriteGranted,
)
from gms_core.runtime_dir import socket_path
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Descriptor, Driver

log = logging.getLogger(__name__)

SLAB_BYTES = {"cuda": 2**30, "host": 64 * 2**20}
"""Bytes of a slab by driver. A large slab makes attaching cheap; on ``host`` memory is touched when it is made, so slabs are smaller."""
REPLY_S = 60.0
"""Seconds for a reply to a request that does not wait for anybody."""
REVIVE_S = 0.5
"""Seconds between two looks at whether a request has resumed the session."""

AnyReply = TypeVar("AnyReply", bound=Message)
Kinds = type[AnyReply] | tuple[type[AnyReply], ...]
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def connect(device: DeviceId | None = None, *, socket_path: Path | None = None, client: str = "", timeout_s: float = 10.0) -> Session:
    """Open a session with the server of a device.

    Args:
        device: Whose server to find in the runtime directory, and to insist on; None takes whatever device the server at ``socket_path`` has.
        socket_path: Where the server listens, if not in the runtime directory.
        client: How the session shows in status and logs.
        timeout_s: Seconds for connecting and the handshake, and to wait for the server that follows one which was killed.

    Raises:
        ServerUnavailable: No server listens there.
        PermissionRefused: The socket, or the server behind it, is another user's.
        ProtocolError: Something else listens there.
        WrongDevice: The server has another device.
    """
    path = _path(device, socket_path)
    hello = Hello(PROTOCOL_VERSIONS, client or f"gms {__version__}", device or "")
    channel, welcome = greet_next(path, hello, timeout_s)
    return Session(channel, welcome, path, hello)


def _path(device: DeviceId | None, path: Path | None) -> Path:
    if path is not None:
        return path
    if device is None:
        raise InvalidArgument("connect needs a device or the path of a socket")
    return socket_path(device, settings().runtime_dir)


def _expect(kinds: Kinds[AnyReply], answer: Answer) -> AnyReply:
    reply, descriptors = answer
    if not isinstance(reply, kinds) or descriptors:
        close_descriptors(descriptors)
        due = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ProtocolError(f"the server answered with {type(reply).__name__} where {due} was due")
    return reply


def _gives_notice(descriptor: int) -> bool:
    """Whether the kernel will give notice of this process's death. Without it a death is noticed later, and nothing else is different."""
    try:
        death_notice.give_at_death(descriptor)
    except ProtocolError as error:
        log.warning("the server gets no early notice of this process's death: %s", error)
        return False
    return True


class Session:
    """One authenticated connection; it lives in one process. The connection is the lease: when it ends, all leases end.

    A server that is killed takes nothing with it: the session goes on at the server that follows, and a request that was under way is asked again.

    Safe to use from several threads; requests go one after the other. After a fork the child can use nothing of it.

    Attributes:
        welcome: What the server said of itself.
    """

    def __init__(self, channel: Channel, welcome: Welcome, path: Path, hello: Hello) -> None:
        self.welcome = welcome
        self._channel = channel
        self._path, self._hello = path, hello
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._driver: Driver | None = None
        _sessions.add(self)
        if welcome.token:
            watch().add(channel.fileno(), self)

    @property
    def device(self) -> DeviceId:
        """UUID of the server's device, or ``host``."""
        return DeviceId(self.welcome.device)

    @property
    def driver(self) -> Driver:
        """The driver that maps this device's memory into this process; opened on first use."""
        self._check()
        with self._lock:
            if self._driver is None:
                self._driver = open_driver(self.device)
            return self._driver

    def acquire(
        self,
        pool: str,
        mode: Mode,
        identity: Identity,
        *,
        timeout_s: float,
        on_wait: Callable[[str], None] | None = None,
        replace: int | None = None,
        slab_bytes: int | None = None,
        memory_timeout_s: float = REPLY_S,
    ) -> WriteLease | ReadLease:
        """Get a lease on a published pool.

        Args:
            pool: Its name.
            mode: ``rw`` to publish a new generation, ``ro`` to read what is published (waiting for it), ``auto`` for whichever comes first.
            identity: What the caller expects, or is about to publish.
            timeout_s: Seconds to wait at most.
            on_wait: Called with the reason, each time that it changes, while the request waits.
            replace: With ``rw``: drop this committed generation first, once it has no readers.
            slab_bytes: Of a writer's slabs; `SLAB_BYTES` if None.
            memory_timeout_s: Seconds that a writer's allocations wait for memory that others release.

        Raises:
            AcquireTimeout: It was not granted in time.
            IdentityMismatch: Something else is published; the fields that differ are in ``details``.
            GenerationConflict: ``replace`` names a generation that is not the committed one.
        """
        if not (math.isfinite(timeout_s) and timeout_s >= 0):
            raise InvalidArgument(f"a timeout of {timeout_s} s is not a finite, non-negative number")
        if slab_bytes is not None and slab_bytes <= 0:
            raise InvalidArgument(f"a slab of {slab_bytes} bytes is not positive")
        granted, _ = self._call(Acquire(pool, mode, identity, timeout_s, replace, renumbers=True), timeout_s + REPLY_S, on_wait)
        if isinstance(granted, ReadGranted):
            return ReadLease(self, pool, granted.layout)
        write = _expect(WriteGranted, (granted, ()))
        try:
            slab = slab_bytes or SLAB_BYTES.get(self.welcome.driver, 2**30)
            capacity = round_up(self.driver.total_bytes, slab)
            return WriteLease(
                self,
                pool,
                write.generation,
                capacity=capacity,
                slab_bytes=round_up(slab, self.welcome.granularity),
                memory_timeout_s=memory_timeout_s,
            )
        except BaseException:
            self.perform(Release(pool))
            raise

    def status(self) -> StatusReport:
        """The server's state at one instant."""
        return _expect(StatusReport, self._call(Status()))

    def perform(self, request: Message) -> None:
        """Carry out a request that has no result and waits for nobody."""
        _expect(Done, self._call(request))

    def ask(self, request: Message, kinds: Kinds[AnyReply], timeout_s: float = 0.0, on_wait: Callable[[str], None] | None = None) -> AnyReply:
        """Carry out a request that is answered by one message of these kinds.

        Args:
            request: It may wait for others.
            kinds: What the answer can be.
            timeout_s: Seconds that the request itself says it may wait.
            on_wait: Called with the reason, each time that it changes, while the request waits.
        """
        if not (math.isfinite(timeout_s) and timeout_s >= 0):
            raise InvalidArgument(f"a timeout of {timeout_s} s is not a finite, non-negative number")
        return _expect(kinds, self._call(request, timeout_s + REPLY_S, on_wait))

    def commit(self, request: Commit) -> ReadGranted:
        """Publish a draft."""
        return _expect(ReadGranted, self._call(request))

    def join(self, request: Join) -> None:
        """Join a cohort, and have the kernel give the server notice of this process's death, if it can."""
        with self._lock:
            joined, descriptors = self._call(request)
            try:
                if not isinstance(joined, Joined) or len(descriptors) != joined.notice:
                    raise ProtocolError(f"the server answered with {type(joined).__name__} and {len(descriptors)} descriptors")
                notifies = all(_gives_notice(descriptor) for descriptor in descriptors)
            finally:
                close_descriptors(descriptors)
            if descriptors and notifies:
                self.perform(WillNotify())

    def receive_allocations(self, request: Allocate | Export, take: Take) -> None:
        """Carry out a request that is answered by descriptors.

        Args:
            request: Which allocations.
            take: Called for some of them at a time, in order; their descriptors are closed when it returns.
        """
        wait = request.timeout_s if isinstance(request, Allocate) else 0.0
        failure: BaseException | None = None
        taken: set[int] = set()
        with self._lock:
            answer, more = self._call(request, wait + REPLY_S), True
            while more:
                received, more = self._allocations(*answer)
                fresh = [item for item in received if item.id not in taken]  # asked again, the server answers from the beginning
                taken.update(item.id for item in fresh)
                try:
                    if failure is None and (fresh or not received):
                        take(fresh)
                except BaseException as error:  # noqa: BLE001 - raised below: the rest of the answer must be read before anything else can be asked
                    failure = error
                finally:
                    close_descriptors(item.descriptor for item in received)
                if more:
                    answer = self._more(request)
        if failure is not None:
            raise failure

    def _allocations(self, reply: Message, descriptors: tuple[int, ...]) -> tuple[list[Received], bool]:
        """The allocations of one reply, and whether more replies follow."""
        if not isinstance(reply, Descriptors) or not len(reply.ids) == len(reply.sizes) == len(descriptors):
            close_descriptors(descriptors)
            self.close()
            raise ProtocolError(f"the server answered with {type(reply).__name__} and {len(descriptors)} descriptors")
        return [*map(Received, reply.ids, reply.sizes, map(Descriptor, descriptors))], reply.more

    def _call(self, request: Message, timeout_s: float = REPLY_S, on_wait: Callable[[str], None] | None = None) -> Answer:
        with self._lock:
            self._check()
            with self._closed_when_broken():
                answer = self._exchange(request, timeout_s, on_wait)
            return accepted(answer)

    def _exchange(self, request: Message, timeout_s: float, on_wait: Callable[[str], None] | None) -> Answer:
        asked = time.monotonic()
        while True:
            try:
                check_known(self.welcome, request)
                self._channel.send(request)
                return final(self._channel, timeout_s, on_wait)
            except ConnectionLost as error:
                self._resume(error, repeats=True)
                request = in_the_time_left(request, asked + timeout_s - REPLY_S)

    def _more(self, request: Message) -> Answer:
        """The next part of an answer; all of it once more if the server was killed in between."""
        with self._closed_when_broken():
            try:
                answer = final(self._channel, REPLY_S, None)
            except ConnectionLost as error:
                self._resume(error, repeats=True)
                answer = self._exchange(request, REPLY_S, None)
        return accepted(answer)

    def _resume(self, error: ConnectionLost, *, repeats: bool) -> None:
        """Go on at the server that follows.

        Raises:
            ConnectionLost: There is none, or it does not know this session; or the server is there and has not answered in time.
        """
        if not self.welcome.token or not self._channel.ended or self._closed:
            raise error
        watch().remove(self._channel.fileno())
        log.info("the server at %s has gone; session %d goes on at the next one", self._path, self.welcome.session)
        try:
            channel, self.welcome = resume(self._path, self._hello, self.welcome, repeats, lambda: self._closed)
        except ConnectionLost:
            raise
        except GmsError as lost:  # whatever it is: what the server did is unknown, and that is what the caller has to hear
            raise error from lost
        before, self._channel = self._channel, channel
        before.close()
        if self._closed:
            raise error
        watch().add(channel.fileno(), self)

    def revive(self) -> None:
        """The server has closed the connection. A request that is under way resumes the session by itself; else it is done here."""
        lost = self._channel
        while not self._lock.acquire(timeout=REVIVE_S):
            if self._channel is not lost or self._closed:
                return
        try:
            if self._channel is lost and not self._closed and os.getpid() == self._pid:
                if not lost.has_ended():
                    watch().add(lost.fileno(), self)  # the descriptor's number was another session's before
                    return
                self._resume(ConnectionLost("the server closed the connection"), repeats=False)
        except GmsError as error:
            log.warning("session %d with the server at %s is lost: %s", self.welcome.session, self._path, error)
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _closed_when_broken(self) -> Iterator[None]:
        """Close the session when a request was broken off, by whatever: what the server did is unknown, and no later request may read its answer."""
        try:
            yield
        except VersionMismatch:
            raise  # this server was not asked
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedSession("this session belongs to the parent process", hint="Call gms_core.client.connect in the child.")
        if self._closed:
            raise SessionClosed("the session is closed")

    def close(self) -> None:
        """End the connection, and with it every lease, also while another thread waits for one. Memory that is mapped stays mapped. Idempotent."""
        if not self._closed:
            self._closed = True
            self._channel.shut_down()
            with self._lock:
                if self.welcome.token:
                    watch().remove(self._channel.fileno())
                self._channel.close()

    def forget(self) -> None:
        """In a forked child: close its copy of the connection, so that the parent's end is the end."""
        self._closed = True
        self._lock = threading.RLock()  # a thread that the child does not have may hold the parent's
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _after_fork() -> None:
    for session in list(_sessions):
        session.forget()


os.register_at_fork(after_in_child=_after_fork)
