"""A connection between two agents who know one secret: each proves it to the other, and signs what it says. What is said is no secret.

Both choose a random number. The secret and both numbers make the keys of this connection, one for each direction, so that nothing can be played
again, on this connection or on another one, or be sent back. A message is its length, itself, and its signature (HMAC-SHA-256), which covers its
number.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import struct

from gms_core.errors import ConnectionLost, PermissionRefused

MAGIC = b"gms-agent/1\n"
NONCE_BYTES = 32
MOST_BYTES = 2**16
HANDSHAKE_S = 5.0
"""Seconds that the other end has to prove that it knows the secret."""

_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")
_SIGNATURE_BYTES = hashlib.sha256().digest_size


class Channel:
    """One end of such a connection. One task at a time may send, and one receive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send_key: bytes, receive_key: bytes) -> None:
        """Use a connection whose ends have proved themselves; see `accept` and `connect`."""
        self._reader, self._writer = reader, writer
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    @property
    def peer(self) -> str:
        """Address of the other end."""
        host, port = (self._writer.get_extra_info("peername") or ("?", 0))[:2]
        return f"{host}:{port}"

    async def send(self, message: bytes) -> None:
        """Say something.

        Raises:
            ConnectionLost: Nobody can hear it any more.
        """
        signature = _sign(self._send_key, _NUMBER.pack(self._sent) + message)
        self._sent += 1
        try:
            self._writer.write(_LENGTH.pack(len(message)) + message + signature)
            await self._writer.drain()
        except OSError as error:
            raise ConnectionLost(f"the connection with {self.peer} has ended: {error}") from error

    async def receive(self) -> bytes:
        """What the other end says next.

        Raises:
            ConnectionLost: The connection has ended.
            PermissionRefused: What came was not said by the other end, or not in this order.
        """
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MOST_BYTES:
                raise PermissionRefused(f"{self.peer} says more than an agent does")
            message = await self._reader.readexactly(size)
            signature = await self._reader.readexactly(_SIGNATURE_BYTES)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ConnectionLost(f"the connection with {self.peer} has ended") from error
        if not hmac.compare_digest(signature, _sign(self._receive_key, _NUMBER.pack(self._received) + message)):
            raise PermissionRefused(f"what came from {self.peer} was not signed by an agent of this engine")
        self._received += 1
        return message

    def close(self) -> None:
        """End the connection at once. Idempotent."""
        self._writer.transport.abort()


async def connect(host: str, port: int, secret: bytes) -> Channel:
    """Connect with an agent that listens.

    Raises:
        OSError: Nobody listens there.
        ConnectionLost: It has hung up, or does not answer.
        PermissionRefused: It does not know the secret.
    """
    reader, writer = await asyncio.open_connection(host, port)
    return await _begin(reader, writer, secret, listens=False)


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> Channel:
    """The other end of `connect`, with what came to a listening socket. Raises what that does."""
    return await _begin(reader, writer, secret, listens=True)


async def _begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, *, listens: bool) -> Channel:
    peer = (writer.get_extra_info("peername") or ("?",))[0]
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            return await _prove(reader, writer, secret, str(peer), listens=listens)
    except TimeoutError as error:
        writer.transport.abort()
        raise ConnectionLost(f"{peer} does not say that it is an agent of this engine") from error
    except (OSError, asyncio.IncompleteReadError) as error:
        writer.transport.abort()
        raise ConnectionLost(f"{peer} has hung up before it had proved that it is an agent of this engine: is its secret the same?") from error
    except BaseException:
        writer.transport.abort()
        raise


async def _prove(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, peer: str, *, listens: bool) -> Channel:
    own = secrets.token_bytes(NONCE_BYTES)
    writer.write(MAGIC + own)
    await writer.drain()
    greeting = await reader.readexactly(len(MAGIC) + NONCE_BYTES)
    if not greeting.startswith(MAGIC):
        raise PermissionRefused(f"{peer} is no agent of this version")
    other = greeting[len(MAGIC) :]
    numbers = own + other if listens else other + own
    keys = {side: _sign(secret, MAGIC + side + numbers) for side in (b"listener", b"caller")}
    mine, theirs = (b"listener", b"caller") if listens else (b"caller", b"listener")
    if not listens:  # who calls proves itself first: whoever scans ports is shown nothing that the secret was used for
        writer.write(_sign(keys[mine], b"proof"))
        await writer.drain()
    if not hmac.compare_digest(await reader.readexactly(_SIGNATURE_BYTES), _sign(keys[theirs], b"proof")):
        raise PermissionRefused(f"{peer} does not know the secret of this engine's agents")
    if listens:
        writer.write(_sign(keys[mine], b"proof"))
        await writer.drain()
    return Channel(reader, writer, keys[mine], keys[theirs])


def _sign(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")
