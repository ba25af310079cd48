"""A blocking end of a connection, for clients. Not thread-safe: one request at a time."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque

from gms_core.errors import ConnectionLost, ProtocolError
from gms_core.protocol.framing import Frame, FrameDecoder, close_descriptors, decode_reply, encode
from gms_core.protocol.messages import Message, Reply
from gms_core.protocol.peer import receive, send

SEND_S = 60.0
"""Seconds for which the server may take no byte of a request."""


class Channel:
    """Sends messages and receives replies on a connected socket, which it owns.

    Attributes:
        ended: Whether the server has closed its end, or the connection broke.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.ended = False
        self._socket = connection
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()

    def send(self, message: Message) -> None:
        """Send one message, whole.

        Raises:
            ConnectionLost: The server has gone, or takes nothing any more.
        """
        data = memoryview(encode(message))
        try:
            self._socket.settimeout(SEND_S)
            while data:
                data = data[send(self._socket, data) :]
        except TimeoutError as error:
            raise ConnectionLost(f"the server has taken nothing for {SEND_S:g} s") from error
        except OSError as error:
            self.ended = True
            raise ConnectionLost(f"the server's connection ended while a request was sent: {error.strerror or error}") from error

    def receive(self, timeout_s: float | None) -> tuple[Reply, tuple[int, ...]]:
        """Wait for one message and its descriptors, which the caller then owns.

        Args:
            timeout_s: Seconds to wait at most; None waits for as long as the connection lives.

        Raises:
            ConnectionLost: The connection ended, or the time is over: what the server did is then unknown, so the channel is of no more use.
            ProtocolError: The peer is no GMS server.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._frames:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise ConnectionLost(f"the server did not answer within {timeout_s:g} s")
            self._socket.settimeout(remaining)
            try:
                data, descriptors = receive(self._socket)
            except TimeoutError:
                continue
            except OSError as error:
                self.ended = True
                raise ConnectionLost(f"the server's connection ended while a reply was due: {error.strerror or error}") from error
            if not data:
                self.ended = True
                raise ConnectionLost("the server closed the connection while a reply was due")
            self._frames.extend(self._decoder.feed(data, descriptors))
        frame = self._frames.popleft()
        try:
            return decode_reply(frame.payload), frame.descriptors
        except ProtocolError:
            close_descriptors(frame.descriptors)
            raise

    def has_ended(self) -> bool:
        """Whether the server has closed its end by now."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP | select.POLLHUP)
        self.ended = self.ended or bool(poll.poll(0))
        return self.ended

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._socket.fileno()

    def shut_down(self) -> None:
        """End the connection while another thread may be waiting on it; that thread gets `ConnectionLost`. Close the channel afterwards."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and every descriptor that was not handed out."""
        for frame in self._frames:
            close_descriptors(frame.descriptors)
        self._frames.clear()
        self._decoder.close()
        self._socket.close()
