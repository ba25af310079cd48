"""Ports for tests."""

from __future__ import annotations

import contextlib
import random
import socket

FIRST, END = 20_000, 32_000
"""Below the ports that the kernel gives to whoever asks for any: a connection of somebody else cannot take one before its user listens."""


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    while True:
        port = random.SystemRandom().randrange(FIRST, END)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
