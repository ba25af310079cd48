"""Asks a server one thing, on a connection of its own, and is done with it in a time that is known beforehand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

from gms_core.client.dial import accepted, final, greet
from gms_core.errors import ProtocolError
from gms_core.protocol.framing import close_descriptors
from gms_core.protocol.messages import PROTOCOL_VERSIONS, Hello, Message

AnyReply = TypeVar("AnyReply", bound=Message)

UNRESUMED = tuple(version for version in PROTOCOL_VERSIONS if version == 1)
"""The version whose sessions nobody resumes: of one that is over in a moment the server need write nothing down."""


def ask_once(path: Path, request: Message, kind: type[AnyReply], *, client: str, limit_s: float) -> AnyReply:
    """Connect, ask, and close.

    Args:
        path: Of the server's socket.
        request: It waits for nobody.
        kind: Of the answer.
        client: How the session shows in status.
        limit_s: Seconds that it may take.

    Raises:
        ServerUnavailable, PermissionRefused: As `gms_core.client.connect` says.
        ConnectionLost: The server did not answer in time.
        ProtocolError: It answered with something else.
        GmsError: It has refused the request.
    """
    deadline = time.monotonic() + limit_s
    channel, _ = greet(path, Hello(UNRESUMED or PROTOCOL_VERSIONS, client), limit_s)
    try:
        channel.send(request)
        reply, descriptors = accepted(final(channel, max(0.0, deadline - time.monotonic()), None))
    finally:
        channel.close()
    if not isinstance(reply, kind) or descriptors:
        close_descriptors(descriptors)
        raise ProtocolError(f"the server answered with {type(reply).__name__} where {kind.__name__} was due")
    return reply
