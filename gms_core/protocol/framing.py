"""The codec, without I/O: bytes and descriptors in, frames out.

A frame is a header (magic, bytes of the payload, number of descriptors) and a MessagePack payload. Its descriptors travel as ancillary data
with its first byte, so they arrive no later than the payload's end, and in order.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from gms_core.errors import ProtocolError
from gms_core.protocol.messages import Message, Reply, Request

HEADER = struct.Struct("!4sIH")
MAGIC = b"GMS1"
MAX_DESCRIPTORS = 253
"""The kernel's SCM_MAX_FD: descriptors in one message."""
MAX_PAYLOAD = 64 * 2**20
"""Bytes. The largest message carries a tensor manifest; one of 100,000 tensors has about 15 MiB."""

Decoded = TypeVar("Decoded")
Item = TypeVar("Item")

_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


class Frame(NamedTuple):
    """One message as it arrived. Whoever takes the frame owns its descriptors."""

    payload: bytes
    descriptors: tuple[int, ...]


def encode(message: Message, descriptors: int = 0) -> bytes:
    """The bytes of a frame that announces so many descriptors.

    Raises:
        ProtocolError: The message or the number of descriptors is over the limit.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_PAYLOAD or descriptors > MAX_DESCRIPTORS:
        raise ProtocolError(f"a {type(message).__name__} of {len(payload)} bytes with {descriptors} descriptors is over the limit of a frame")
    return HEADER.pack(MAGIC, len(payload), descriptors) + payload


def _decode(decoder: msgspec.msgpack.Decoder[Decoded], payload: bytes) -> Decoded:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the peer sent a message that is not understood: {error}") from error


def decode_request(payload: bytes) -> Request:
    """Decode a client's message, strictly typed.

    Raises:
        ProtocolError: It is none.
    """
    return _decode(_requests, payload)


def decode_reply(payload: bytes) -> Reply:
    """Decode a server's message, strictly typed.

    Raises:
        ProtocolError: It is none.
    """
    return _decode(_replies, payload)


class FrameDecoder:
    """Cuts a stream into frames. It owns descriptors until it hands them out or is closed.

    Args:
        max_payload: Bytes that a payload may have; a peer that announces more is cut off before it sends them.
        max_descriptors: Descriptors that a frame may have.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD, max_descriptors: int = MAX_DESCRIPTORS) -> None:
        self.max_payload = max_payload
        self.max_descriptors = max_descriptors
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    @property
    def incomplete(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    @property
    def buffered(self) -> int:
        """Bytes of the frame that has begun."""
        return len(self._buffer)

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> list[Frame]:
        """Take what one ``recvmsg`` returned.

        Returns:
            The frames that it completed.

        Raises:
            ProtocolError: The stream is not the protocol, or breaks a limit. Close the decoder then.
        """
        self._buffer += data
        self._descriptors.extend(descriptors)
        frames = []
        try:
            while (frame := self._next()) is not None:
                frames.append(frame)
            if len(self._descriptors) > self.max_descriptors:
                raise ProtocolError(f"the peer sent {len(self._descriptors)} descriptors at once; {self.max_descriptors} are allowed")
        except ProtocolError:
            close_descriptors(number for frame in frames for number in frame.descriptors)
            raise
        return frames

    def _next(self) -> Frame | None:
        if not MAGIC.startswith(bytes(self._buffer[: len(MAGIC)])):
            raise ProtocolError("the peer does not speak the GMS protocol")
        if len(self._buffer) < HEADER.size:
            return None
        _, size, count = HEADER.unpack_from(self._buffer)
        if size > self.max_payload:
            raise ProtocolError(f"the peer announced a message of {size} bytes; {self.max_payload} are allowed")
        if count > self.max_descriptors:
            raise ProtocolError(f"the peer announced {count} descriptors; {self.max_descriptors} are allowed")
        end = HEADER.size + size
        if len(self._buffer) < end:
            return None
        if len(self._descriptors) < count:
            raise ProtocolError(f"the peer announced {count} descriptors and sent {len(self._descriptors)}")
        payload = bytes(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return Frame(payload, tuple(self._descriptors.popleft() for _ in range(count)))

    def close(self) -> None:
        """Close the descriptors that were not handed out."""
        close_descriptors(self._descriptors)
        self._descriptors.clear()
        self._buffer.clear()


def close_descriptors(descriptors: Iterable[int]) -> None:
    """Close descriptors that arrived with a message."""
    for descriptor in descriptors:
        os.close(descriptor)


def batches(items: Sequence[Item], size: int = MAX_DESCRIPTORS) -> list[Sequence[Item]]:
    """Cut a sequence into pieces that fit one frame's descriptors each; an empty one gives one empty piece."""
    return [items[start : start + size] for start in range(0, len(items), size)] or [items]
