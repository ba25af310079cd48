"""A connection to a device server, and the requests that go over it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from gms_core import __version__, death_notice
from gms_core.client.arena import Received, Take, round_up
from gms_core.client.lease import ReadLease, WriteLease
from gms_core.config import settings
from gms_core.devices import DeviceId
from gms_core.errors import (
    ConnectionLost,
    ForkedSession,
    InvalidArgument,
    PermissionRefused,
    ProtocolError,
    ServerUnavailable,
    SessionClosed,
    rebuild,
)
from gms_core.layout import Identity
from gms_core.protocol.channel import Channel
from gms_core.protocol.framing import close_descriptors
from gms_core.protocol.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Allocate,
    Commit,
    Descriptors,
    Done,
    Export,
    Failure,
    Hello,
    Join,
    Joined,
    Message,
    Mode,
    ReadGranted,
    Release,
    Status,
    StatusReport,
    Waiting,
    Welcome,
    WillNotify,
    WriteGranted,
)
from gms_core.protocol.peer import peer_credentials
from gms_core.runtime_dir import check_socket, socket_path, start_hint
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Descriptor, Driver

log = logging.getLogger(__name__)

SLAB_BYTES = {"cuda": 2**30, "host": 64 * 2**20}
"""Bytes of a slab by driver. A large slab makes attaching cheap; on ``host`` memory is touched when it is made, so slabs are smaller."""
REPLY_S = 60.0
"""Seconds for a reply to a request that does not wait for anybody."""

Answer = tuple[Message, tuple[int, ...]]
"""A reply and its descriptors."""
AnyReply = TypeVar("AnyReply", bound=Message)
Kinds = type[AnyReply] | tuple[type[AnyReply], ...]
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def connect(device: DeviceId | None = None, *, socket_path: Path | None = None, client: str = "", timeout_s: float = 10.0) -> Session:
    """Open a session with the server of a device.

    Args:
        device: Whose server to find in the runtime directory, and to insist on; None takes whatever device the server at ``socket_path`` has.
        socket_path: Where the server listens, if not in the runtime directory.
        client: How the session shows in status and logs.
        timeout_s: Seconds for connecting and the handshake.

    Raises:
        ServerUnavailable: No server listens there.
        PermissionRefused: The socket, or the server behind it, is another user's.
        ProtocolError: Something else listens there.
        WrongDevice: The server has another device.
    """
    path = _path(device, socket_path)
    check_socket(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(connection)
    try:
        _dial(connection, path, timeout_s)
        channel.send(Hello((PROTOCOL_VERSION,), client or f"gms {__version__}", device or ""))
        welcome = _expect(Welcome, _accepted(_final(channel, timeout_s, None)))
    except ConnectionLost as error:
        channel.close()
        raise ServerUnavailable(f"{path} does not answer as a GMS server: {error}") from error
    except BaseException:
        channel.close()
        raise
    return Session(channel, welcome)


def _path(device: DeviceId | None, path: Path | None) -> Path:
    if path is not None:
        return path
    if device is None:
        raise InvalidArgument("connect needs a device or the path of a socket")
    return socket_path(device, settings().runtime_dir)


def _dial(connection: socket.socket, path: Path, timeout_s: float) -> None:
    connection.settimeout(timeout_s)
    try:
        connection.connect(os.fspath(path))
    except PermissionError as error:
        raise PermissionRefused(f"{path} may not be used by this user: {error.strerror}") from error
    except OSError as error:
        raise ServerUnavailable(f"nothing listens at {path}: {error.strerror or error}", hint=start_hint(path)) from error
    owner = peer_credentials(connection).uid
    if owner not in (os.getuid(), 0):
        raise PermissionRefused(f"the server behind {path} runs as user {owner}, which is neither this user nor root")


def _final(channel: Channel, timeout_s: float | None, on_wait: Callable[[str], None] | None) -> Answer:
    """The next reply that is no notice."""
    while True:
        reply, descriptors = channel.receive(timeout_s)
        if not isinstance(reply, Waiting):
            return reply, descriptors
        if on_wait is not None:
            on_wait(reply.reason)


def _accepted(answer: Answer) -> Answer:
    """The same answer, unless it is a refusal: that is raised as the error that it names."""
    reply, descriptors = answer
    if isinstance(reply, Failure):
        close_descriptors(descriptors)
        raise rebuild(reply.code, reply.message, reply.hint, reply.details)
    return answer


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

    Safe to use from several threads; requests go one after the other. After a fork the child can use nothing of it.

    Attributes:
        welcome: What the server said of itself.
    """

    def __init__(self, channel: Channel, welcome: Welcome) -> None:
        self.welcome = welcome
        self._channel = channel
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._driver: Driver | None = None
        _sessions.add(self)

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
        granted, _ = self._call(Acquire(pool, mode, identity, timeout_s, replace), timeout_s + REPLY_S, on_wait)
        if isinstance(granted, ReadGranted):
            return ReadLease(self, pool, granted.layout)
        write = _expect(WriteGranted, (granted, ()))
        try:
            slab = slab_bytes or SLAB_BYTES.get(self.welcome.driver, 2**30)
            capacity = round_up(self.driver.memory_info().total, slab)
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
        with self._lock:
            answer, more = self._call(request, wait + REPLY_S), True
            while more:
                received, more = self._allocations(*answer)
                try:
                    if failure is None:
                        take(received)
                except BaseException as error:  # noqa: BLE001 - raised below: the rest of the answer must be read before anything else can be asked
                    failure = error
                finally:
                    close_descriptors(item.descriptor for item in received)
                if more:
                    answer = self._read(REPLY_S)
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
                self._channel.send(request)
                answer = _final(self._channel, timeout_s, on_wait)
            return _accepted(answer)

    def _read(self, timeout_s: float) -> Answer:
        with self._closed_when_broken():
            answer = _final(self._channel, timeout_s, None)
        return _accepted(answer)

    @contextlib.contextmanager
    def _closed_when_broken(self) -> Iterator[None]:
        """Close the session when a request was broken off, by whatever: what the server did is unknown, and no later request may read its answer."""
        try:
            yield
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
