"""The socket of a device server: bound once, private to its user and to who else is allowed, and one task a connection."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gms_core.allowed import Allowed
from gms_core.errors import GmsError, PermissionRefused, ProtocolError, QuotaExceeded, ServerUnavailable
from gms_core.protocol.messages import Failure, Hello, Message
from gms_core.server.connection import Connection
from gms_core.server.ownership import owned
from gms_core.server.service import Service
from gms_core.server.sessions import Session

log = logging.getLogger(__name__)

BACKLOG = 1024
COMPLAINTS, COMPLAINTS_S = 20, 10.0
"""Refused connections that are logged in so many seconds."""
CANCEL_AGAIN_S = 0.2
"""Seconds that a connection's task has to end, until it is told so once more."""
NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)


@contextlib.contextmanager
def bound_socket(path: Path, group: int | None = None) -> Iterator[socket.socket]:
    """A listening socket at ``path`` with mode 0600, or 0660 for a group, for as long as the context lasts.

    A lock beside it tells whether another server lives; a socket that a dead server left is replaced. The socket appears under its name only
    when it listens, so that a client that finds it can connect.

    Raises:
        ServerUnavailable: Another server owns the path.
        PermissionRefused: The directory does not let this user make the lock or the socket.
        ServerUnavailable: They cannot be made for another reason, such as a full disk.
    """
    with contextlib.ExitStack() as ends:
        with _refused_by_the_directory(path):
            lock = ends.enter_context(owned(path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            with _refused_by_the_directory(path):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                staging = path.with_suffix(".new")  # not longer than the path itself; the lock makes it this server's own
                staging.unlink(missing_ok=True)
                listening.bind(os.fspath(staging))
                staging.chmod(0o600)
                if group is not None:
                    os.chown(staging, -1, group, follow_symlinks=False)
                    staging.chmod(0o660)
                listening.listen(BACKLOG)
                listening.setblocking(False)
                staging.rename(path)
            try:
                yield listening
            finally:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _refused_by_the_directory(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"the socket {path} cannot be made: {error.strerror}"
        if error.errno in NOT_PERMITTED:
            raise PermissionRefused(message, hint="Remove what another user left there, or use another --runtime-dir.") from error
        raise ServerUnavailable(message, hint="See that there is room and nothing else of that name, or use another --runtime-dir.") from error


class Listener:
    """Accepts connections and runs one task for each. Whatever a client does wrong ends its own connection, and no other."""

    def __init__(self, listening: socket.socket, service: Service, uid: int, allowed: Allowed | None = None) -> None:
        """Begin to listen.

        Args:
            listening: See `bound_socket`.
            service: Carries requests out.
            uid: Of this server.
            allowed: Who may use it besides that user and root; None for nobody.
        """
        self._listening = listening
        self._service = service
        self._uid = uid
        self._allowed = allowed or Allowed()
        self._greeting: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._complaints, self._complained_since = 0, -COMPLAINTS_S
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(self._listening)
                except OSError as error:  # too many open files: those that are open must be able to end
                    log.error("a connection could not be accepted: %s", error.strerror)
                    await asyncio.sleep(0.1)
                    continue
                task = asyncio.create_task(self._serve(accepted))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._service.stop()
            while self._tasks:  # more than once: whatever swallows a cancellation must not keep the device from its next server
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks, timeout=CANCEL_AGAIN_S)

    async def _serve(self, accepted: socket.socket) -> None:
        with contextlib.closing(Connection(accepted, self._service.limits, self._received)) as connection:
            session: Session | None = None
            try:
                with self._newcomer(connection.peer.uid):
                    session = await self._shake_hands(connection)
                while session is not None and (request := await connection.receive()) is not None:
                    try:
                        await self._service.handle(session, request, connection.ended)
                    except ProtocolError:
                        raise
                    except GmsError as error:
                        await connection.send(refusal(error))
            except GmsError as error:
                self._complain("connection of pid %d refused: %s", connection.peer.pid, error)
                with contextlib.suppress(ConnectionError, OSError):
                    await connection.send(refusal(error))
            except OSError as error:
                log.debug("connection of pid %d ended: %s", connection.peer.pid, error)
            except Exception:
                log.exception("a request of pid %d failed; its connection is closed", connection.peer.pid)
            finally:
                if session is not None:
                    self._service.close(session)

    def _complain(self, message: str, *facts: object) -> None:
        """Log what a client did wrong, but no more than so often: a log is on a disk, and every refusal would be a line of it."""
        now = asyncio.get_running_loop().time()
        if now - self._complained_since >= COMPLAINTS_S:
            if self._complaints > COMPLAINTS:
                log.warning("%d more connections were refused", self._complaints - COMPLAINTS)
            self._complained_since, self._complaints = now, 0
        self._complaints += 1
        log.log(logging.WARNING if self._complaints <= COMPLAINTS else logging.DEBUG, message, *facts)

    @contextlib.contextmanager
    def _newcomer(self, uid: int) -> Iterator[None]:
        """Count a connection that has not shaken hands yet: were there no limit for each user, one could keep all others out."""
        most = self._service.limits.handshakes
        if self._greeting[uid] >= most:
            raise QuotaExceeded(f"user {uid} has {most} connections already that have not shaken hands")
        self._greeting[uid] += 1
        try:
            yield
        finally:
            self._greeting[uid] -= 1
            if not self._greeting[uid]:
                del self._greeting[uid]

    async def _shake_hands(self, connection: Connection) -> Session | None:
        limit = self._service.limits.handshake_s
        try:
            async with asyncio.timeout(limit):
                hello = await connection.receive()
        except TimeoutError:
            raise ProtocolError(f"no handshake within {limit:g} s") from None
        if hello is None:
            return None
        if not self._allowed.admits(connection.peer.uid, connection.groups, self._uid):  # only now: while it sends, a client does not read why
            raise PermissionRefused(
                f"user {connection.peer.uid} may not use this server", hint="Who starts the server may allow it: gms serve --allow USER or :GROUP."
            )
        if not isinstance(hello, Hello):
            raise ProtocolError("the first message is not a handshake")
        session = await self._service.open(hello, connection.peer, connection.send, connection.open_pidfd)
        connection.expect_requests()
        return session


def refusal(error: GmsError) -> Message:
    """The message that tells a client of an error."""
    return Failure(error.code, error.message, error.hint, error.details)
