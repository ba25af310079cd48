"""Who is at the other end of a Unix socket, as the kernel says."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import time
from typing import NamedTuple

from gms_core.errors import ProtocolError
from gms_core.protocol.framing import MAX_DESCRIPTORS, close_descriptors

_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
_SO_PEERPIDFD = 77
_SO_PEERGROUPS = 59
_MOST_GROUPS = 256
"""As many as fit the 1024 bytes that Python's ``getsockopt`` takes."""
RECEIVE_BYTES = 256 * 1024
FULL_S = 0.005
"""Seconds between two tries to get into a queue that is full."""


def connect(connection: socket.socket, path: str | os.PathLike[str], timeout_s: float) -> None:
    """Connect to a Unix socket, also while its queue is full: a socket with a time limit is refused then (connect(2), EAGAIN).

    Args:
        connection: It has the time limit from now on.
        path: Of the listening socket.
        timeout_s: Seconds to wait for a place in the queue.

    Raises:
        OSError: As the kernel says.
    """
    connection.settimeout(timeout_s)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.connect(os.fspath(path))
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        else:
            return
        time.sleep(FULL_S)


class PeerCredentials(NamedTuple):
    """Process, user and group that connected (or that listens), at the time when they did."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """The credentials that the kernel recorded; the peer cannot choose them."""
    return PeerCredentials(*_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


def peer_groups(connection: socket.socket) -> frozenset[int]:
    """All groups that the peer was in when it connected, as the kernel recorded them; of one that has very many only the first."""
    numbers = array.array("I")
    with contextlib.suppress(OSError):  # ERANGE: more than fit
        numbers.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * numbers.itemsize))
    return frozenset({peer_credentials(connection).gid, *numbers})


def process_started(pid: int) -> int:
    """When a process was started, in ticks of the kernel since the boot (proc_pid_stat(5)); 0 if it has exited, or is not visible from here."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def open_process(pid: int, started: int) -> int:
    """A new descriptor of the process with this number that was started at this time, in ticks of the kernel; 0 takes whichever has the number.

    Raises:
        ProcessLookupError: It has exited.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # the number is a thread's by now
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        raise
    if started and process_started(pid) != started:
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return pidfd


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One ``recvmsg``: bytes (empty at the end of the stream) and close-on-exec descriptors.

    Raises:
        ProtocolError: The kernel cut the ancillary data short; what did arrive is closed.
        OSError: As the socket says, `BlockingIOError` included.
    """
    data, ancillary, flags, _ = connection.recvmsg(RECEIVE_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_descriptors(numbers)
        raise ProtocolError("descriptors were lost on the way", hint="Raise the limit of open files (ulimit -n) of the receiving process.")
    return data, list(numbers)


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the peer has closed its end, also if bytes of it are left to be read."""
    asked = select.poll()
    asked.register(connection, 0)  # a hang-up is told without being asked for
    return bool(asked.poll(0))


def send(connection: socket.socket, data: bytes | memoryview, descriptors: tuple[int, ...] = ()) -> int:
    """One ``sendmsg``; returns the bytes that were taken. Descriptors go with the first of them."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return connection.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def open_peer_pidfd(connection: socket.socket, pid: int) -> int:
    """A new close-on-exec descriptor of the process that connected.

    Args:
        connection: The socket.
        pid: Its credentials' process; used where the kernel has no call that tells the process itself (before Linux 6.5).

    Raises:
        OSError: The process is gone, or is not visible from here.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # EINVAL and ESRCH say, before Linux 6.16, that the process is gone: its number may be another's
            raise
    pidfd = os.pidfd_open(pid)
    if _hung_up(connection):  # else it was there while its number was looked up: a process closes its end before its number is given to another
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return pidfd


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP | select.POLLHUP)
    return bool(poll.poll(0))
