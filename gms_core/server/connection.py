"""One end of a connection in the event loop: requests in, replies with descriptors out; a slow peer costs its own connection only."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter, deque

from gms_core.errors import ProtocolError
from gms_core.protocol.framing import MAX_PAYLOAD, Frame, FrameDecoder, decode_request, encode
from gms_core.protocol.messages import Message, Request
from gms_core.protocol.peer import PeerCredentials, has_hung_up, open_peer_pidfd, peer_credentials, peer_groups, receive, send
from gms_core.server.limits import Limits

READ_AHEAD = 4
"""Requests taken from the socket before the first of them is answered; a peer that sends more waits in its own socket buffer."""
HANG_UP_S = 1.0
"""Seconds between two looks at whether a peer has gone from whose socket nothing is taken, since it has sent ahead."""
FRAME_BYTES = 256
"""What a request costs besides its own bytes while it waits to be looked at: many small ones may have arrived at once."""


class Connection:
    """A connected, non-blocking socket that it owns.

    Attributes:
        peer: Who connected.
        groups: All groups of who connected.
        ended: Set once the peer has gone; a request that waits is withdrawn then.
    """

    def __init__(self, connection: socket.socket, limits: Limits, received: Counter[int] | None = None) -> None:
        """Begin to read.

        Args:
            connection: The socket.
            limits: What the peer may cost.
            received: Bytes that have arrived and were not asked for yet, by user, of all connections of the server.
        """
        connection.setblocking(False)
        self.peer: PeerCredentials = peer_credentials(connection)
        self.groups = peer_groups(connection)
        self.ended = asyncio.Event()
        self._socket = connection
        self._limits = limits
        self._decoder = FrameDecoder(limits.hello_bytes, max_descriptors=0)
        self._frames: deque[Frame] = deque()
        self._received = Counter() if received is None else received
        self._in_frames = self._counted = 0
        self._over = False
        self._arrived = asyncio.Event()
        self._broken: ProtocolError | None = None
        self._slow: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._reading = False
        self._resume()

    def open_pidfd(self) -> int:
        """A new descriptor of the process that connected.

        Raises:
            OSError: It is gone, or is not visible from here.
        """
        return open_peer_pidfd(self._socket, self.peer.pid)

    def expect_requests(self) -> None:
        """The handshake is over: allow messages of full size."""
        self._decoder.max_payload = MAX_PAYLOAD

    async def receive(self) -> Request | None:
        """The next request, or None when the peer has gone.

        Raises:
            ProtocolError: The peer broke the protocol.
        """
        while not self._frames:
            if self._broken is not None:
                raise self._broken
            if self.ended.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self._in_frames -= len(frame.payload) + FRAME_BYTES
        self._count()
        self._resume()
        return decode_request(frame.payload)

    async def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message, whole. The descriptors stay the caller's.

        Raises:
            ConnectionError: The peer has gone, or takes nothing.
        """
        data = memoryview(encode(message, len(descriptors)))
        while data:
            try:
                data = data[send(self._socket, data, descriptors) :]
                descriptors = ()
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(self._socket, ready.set)
        try:
            async with asyncio.timeout(self._limits.send_s):
                await ready.wait()
        except TimeoutError as error:
            raise ConnectionAbortedError("the peer takes no bytes") from error
        finally:
            self._loop.remove_writer(self._socket)

    def _resume(self) -> None:
        if not self._reading and len(self._frames) < READ_AHEAD and not self.ended.is_set():
            self._loop.add_reader(self._socket, self._readable)
            self._reading = True

    def _readable(self) -> None:
        try:
            data, descriptors = receive(self._socket)
            if data:
                frames = self._decoder.feed(data, descriptors)
                self._frames.extend(frames)
                self._in_frames += sum(len(frame.payload) + FRAME_BYTES for frame in frames)
                self._count()
            else:
                self._finish()
        except BlockingIOError:
            return
        except ProtocolError as error:
            self._broken = error
            self._finish()
        except OSError:
            self._finish()
        if len(self._frames) >= READ_AHEAD and self._reading:
            self._pause()
            self._look_for_hang_up()
        self._watch_for_slowness()
        self._arrived.set()

    def _count(self) -> None:
        """Count what is held here among all that the user has sent and the server has not looked at yet: memory that costs a sender nothing."""
        if self._over:
            return
        held, user, most = self._in_frames + self._decoder.buffered, self.peer.uid, self._limits.received_bytes
        self._received[user] += held - self._counted
        grown, self._counted = held > self._counted, held
        if grown and self._received[user] > most:
            self._received[user] -= held  # from here on: until it is closed it must not cost the user's other connections theirs
            self._over = True
            raise ProtocolError(f"user {user} has sent more than {most} bytes of requests that are not answered yet")

    def _watch_for_slowness(self) -> None:
        if not self._decoder.incomplete:
            if self._slow is not None:
                self._slow.cancel()
                self._slow = None
        elif self._slow is None:
            self._slow = self._loop.call_later(self._limits.frame_s, self._give_up)

    def _look_for_hang_up(self) -> None:
        """A request that waits is withdrawn when its client has gone, although others wait behind it and nothing is read that would tell."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if self._reading or self.ended.is_set():
            return
        if has_hung_up(self._socket):
            self._finish()
            self._arrived.set()
        else:
            self._look = self._loop.call_later(HANG_UP_S, self._look_for_hang_up)

    def _give_up(self) -> None:
        self._broken = ProtocolError(f"a request did not arrive whole within {self._limits.frame_s:g} s")
        self._finish()
        self._arrived.set()

    def _pause(self) -> None:
        self._loop.remove_reader(self._socket)
        self._reading = False

    def _finish(self) -> None:
        self._pause()
        self.ended.set()

    def close(self) -> None:
        """Close the socket; idempotent."""
        for clock in (self._slow, self._look):
            if clock is not None:
                clock.cancel()
        if self._socket.fileno() >= 0:
            self._finish()
            self._decoder.close()
            self._frames.clear()
            self._in_frames = 0
            self._count()
            if not self._received[self.peer.uid]:
                del self._received[self.peer.uid]
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
