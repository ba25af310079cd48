"""A device server's connection with the keeper of its device: found, or started when there is none."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gms_core.errors import KeeperLost, PermissionRefused, QuotaExceeded, ServerUnavailable, rebuild
from gms_core.keeper import process
from gms_core.protocol.framing import batches, close_descriptors
from gms_core.protocol.peer import connect, peer_credentials

log = logging.getLogger(__name__)

REPLY_S = 10.0
"""Seconds for an answer. A keeper that takes longer is lost: a process is ended and replaced, the supervisor is connected with once more."""
QUEUE = 1024
"""Connections that may wait to be accepted: each client of a server that was killed looks whether there is a keeper."""
NAMES = 4096
"""Names in one message."""
SYSTEMDS = stat.S_ISVTX
"""In the mode of a socket that systemd has too. It means nothing to the kernel, and can be seen when nobody answers, and when the queue is full."""


class Keeper:
    """A connected keeper. Safe to use from several threads.

    Attributes:
        label: What it was last labelled with, through any connection; empty for a new one.
        new: Whether it was started here.
    """

    def __init__(self, path: Path, patience_s: float | None = None, *, stored: bool = False) -> None:
        """Connect to the keeper at a path, or start one there. The caller owns the device's lock, so it is the only one to do so.

        Args:
            path: See `gms_core.runtime_dir.keeper_path`; the directory is prepared.
            patience_s: Seconds without a server after which it is to end; None to leave that as it is, and to start none.
            stored: Whether it is the caller's supervisor, and systemd has what that keeps.

        Raises:
            KeeperLost: There is none, and none can be started.
            ServerUnavailable: Systemd has the memory for a service that is not the caller's, which would lose it.
            PermissionRefused: It is another user's.
        """
        self._path = path
        self._lock = threading.Lock()
        self._child = self._pidfd = -1
        self.label = ""
        self.new = False
        if not stored:
            _check_not_systemds(path)
        try:
            self._greet()
        except (OSError, KeeperLost) as error:  # there is none, or it hangs, or is just ending: the next one takes its place
            if patience_s is None:
                raise KeeperLost(f"there is no keeper at {path}: {error}") from error
            self._child = _start(path, patience_s)
            self.new = True
            try:
                self._greet()
            except OSError as error:
                raise KeeperLost(f"the keeper at {path} cannot be reached: {error.strerror}") from error
        if patience_s is not None:
            self._ask(b"T%g" % patience_s)

    def _greet(self) -> None:
        self._socket = _connected(self._path)
        try:
            # The listening socket is made by the server that starts the keeper, and the kernel names its maker, whoever listens by now.
            if (uid := peer_credentials(self._socket).uid) not in (os.getuid(), 0):
                raise PermissionRefused(f"the keeper at {self._path} is run by user {uid}")
            pid, self.label = self._ask(b"I")[1:].decode().split("\n")
            if int(pid):
                with contextlib.suppress(OSError):  # it has ended again, or is in another container: it cannot be ended from here then
                    self._pidfd = os.pidfd_open(int(pid))
        except BaseException:
            self._socket.close()
            raise

    @property
    def lost(self) -> bool:
        """Whether the connection has ended. A keeper that has answered, if only that it cannot do something, is not lost."""
        return self._socket.fileno() < 0

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """Hand descriptors over, under names; they stay the caller's as well.

        Raises:
            KeeperLost: It does not answer, or systemd does not answer it.
            QuotaExceeded: It can open no more files, or has no room for them.
        """
        for piece in batches(list(descriptors.items())):
            if piece:
                self._ask(b"K" + _joined([name for name, _ in piece]), [number for _, number in piece])

    def set_label(self, label: str) -> None:
        """Label it: a server that finds it so knows whose descriptors it has, and that it has all of them.

        Raises:
            KeeperLost: It does not answer.
        """
        self._ask(b"B" + label.encode())
        self.label = label

    def check(self) -> str:
        """See whether it answers; returns its label.

        Raises:
            KeeperLost: It does not.
        """
        return self._ask(b"I")[1:].decode().partition("\n")[2]

    def drop(self, names: Sequence[str]) -> None:
        """Have it close descriptors. Names that it does not know are no error.

        Raises:
            KeeperLost: It does not answer.
        """
        for piece in batches(list(names), NAMES):
            if piece:
                self._ask(b"D" + _joined(piece))

    def kept(self) -> dict[str, int]:
        """New descriptors of all that it keeps, by name; the caller owns them.

        Raises:
            KeeperLost: It does not answer, or this process can open no more files.
        """
        found: dict[str, int] = {}
        with self._lock, self._unless_lost():
            try:
                self._socket.send(b"L")
                while True:
                    data, numbers, cut = process.receive(self._socket)
                    if data == process.OK:
                        return found
                    if not data:
                        raise KeeperLost(f"the keeper at {self._path} has gone")
                    names = data[1:].decode().split("\n")
                    if data[:1] != b"k" or cut or len(names) != len(numbers):
                        close_descriptors(numbers)
                        raise KeeperLost(f"the keeper at {self._path} has more descriptors than this process may open", hint="Raise ulimit -n.")
                    found.update(zip(names, numbers, strict=True))
            except BaseException:
                close_descriptors(found.values())
                self._socket.close()  # the rest of the answer may be on its way, and would be taken for that to the next question
                raise

    def names(self) -> list[str]:
        """The names of all that it keeps.

        Raises:
            KeeperLost: As `kept` does.
        """
        found = self.kept()
        close_descriptors(found.values())
        return list(found)

    def end(self) -> None:
        """Have it close everything and end. Idempotent; one that has gone is no error."""
        try:
            self._ask(b"E")
        except KeeperLost:
            self.abandon()
        self.close()

    def abandon(self) -> None:
        """Kill it, if it is a process of its own, and end the connection: it does not answer, and what it keeps would be kept for ever."""
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                select.select([self._pidfd], [], [], REPLY_S)
        self.close()

    def close(self) -> None:
        """End the connection; the keeper keeps what it has. Idempotent."""
        self._socket.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child >= 0:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._child, os.WNOHANG)[0]:
                    self._child = -1

    def _ask(self, message: bytes, descriptors: Sequence[int] = ()) -> bytes:
        with self._lock, self._unless_lost():
            self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else [])
            answer = self._socket.recv(process.MESSAGE_BYTES)
        if answer[:1] == process.REFUSED and len(answer) > 1:
            code, text, hint = answer[1:].decode().split("\n", 2)
            raise rebuild(code, text, hint, {})
        if answer == process.REFUSED:
            raise QuotaExceeded(f"the keeper at {self._path} has no room for {len(descriptors)} more descriptors", hint="Raise ulimit -n.")
        if not answer:
            self._socket.close()
            raise KeeperLost(f"the keeper at {self._path} has gone")
        return answer

    @contextlib.contextmanager
    def _unless_lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._socket.close()
            raise KeeperLost(f"the keeper at {self._path} does not answer: {error.strerror or error}") from error


def end_at(path: Path) -> None:
    """End the keeper at a path. One that does not answer or is not there is no error.

    Raises:
        ServerUnavailable: Systemd has the memory.
        PermissionRefused: It is another user's.
    """
    with contextlib.suppress(KeeperLost):
        Keeper(path).end()


def _check_not_systemds(path: Path) -> None:
    """Raise `ServerUnavailable` if systemd has the socket at a path, whether anybody answers there now or not."""
    try:
        if not path.lstat().st_mode & SYSTEMDS:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            connect(visitor, path, 0.0)
    except BlockingIOError:  # so many wait for an answer that there is no room for one more
        pass
    except OSError:  # systemd has closed it, and what came with it
        return
    raise ServerUnavailable(
        f"systemd has the memory of {path.stem} for a unit with --keeper systemd: no other server may have the device",
        hint="Start that unit with systemctl, or stop it, which gives the memory up; or use another --runtime-dir.",
    )


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connect(connection, path, REPLY_S)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(path: Path, store: Callable[[int], object] | None = None) -> socket.socket:
    """A socket that listens at a keeper's path, in the place of whatever was there.

    Args:
        path: The caller owns the device's lock.
        store: Has systemd keep its descriptor too, before anybody can find it.

    Raises:
        OSError: It cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    staging = path.with_suffix(".nkp")
    try:
        staging.unlink(missing_ok=True)
        listening.bind(os.fspath(staging))
        staging.chmod(0o600 if store is None else 0o600 | SYSTEMDS)
        listening.listen(QUEUE)
        if store is not None:
            store(listening.fileno())
        staging.rename(path)
    except BaseException:
        listening.close()
        raise
    return listening


def listens_at(listening: socket.socket, path: Path) -> bool:
    """Whether whoever connects to a path comes to this socket. Those who wait there are sent away.

    Args:
        listening: Of a process that has gone: nobody else takes connections from it.
        path: The caller owns the device's lock.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        try:
            listening.listen(QUEUE)  # the kernel names this process to those who connect from now on
            listening.setblocking(False)
            visitor.setblocking(False)
            visitor.bind("")  # the kernel gives it an address that nobody else has
            list(_visitors(listening))
            visitor.connect(os.fspath(path))
            return visitor.getsockname() in _visitors(listening)
        except OSError:
            return False
        finally:
            listening.setblocking(True)


def _visitors(listening: socket.socket) -> Iterator[str | bytes | None]:
    """Addresses of those who wait to be accepted; the connections are closed."""
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, address = listening.accept()
            connection.close()
            yield address


def _start(path: Path, patience_s: float) -> int:
    """Start a keeper that outlives this process; returns its number."""
    try:
        with listen(path) as listening:
            listening.set_inheritable(True)
            command = [sys.executable, "-I", "-S", process.__file__, str(listening.fileno()), os.fspath(path), str(patience_s)]
            nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
            # Not by subprocess: its object would have to be kept for as long as the keeper lives.
            return os.posix_spawn(command[0], command, {"PATH": os.defpath}, file_actions=nothing, setsid=True)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionRefused(f"no keeper can be started at {path}: {error.strerror}") from error
        raise KeeperLost(f"no keeper can be started at {path}: {error.strerror}") from error


def _joined(names: Sequence[str]) -> bytes:
    return "\n".join(names).encode()
