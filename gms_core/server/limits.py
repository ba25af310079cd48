"""What one client may cost: every bound of the server, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a device server.

    Attributes:
        handshake_s: Seconds from connecting to a complete first message.
        frame_s: Seconds from a request's first byte to its last.
        send_s: Seconds for which a peer may take no byte of a reply.
        hello_bytes: Bytes of the first message.
        sessions: Connections at a time.
        pools: Names of pools.
        allocations: Allocations in all pools together.
        batch: Allocations of one request.
        metadata_bytes: Of an identity and a manifest together; less than a message may have, since readers get them in one.
        wait_s: Seconds that a request may ask to wait.
        exit_s: Seconds from SIGKILL to a process's exit, after which whoever waits for its memory is told that it cannot be ended.
        cohorts: Cohorts at a time.
        name_bytes: Bytes of a name that a client gives to something.
    """

    handshake_s: float = 5.0
    frame_s: float = 30.0
    send_s: float = 30.0
    hello_bytes: int = 4096
    sessions: int = 16384
    pools: int = 256
    allocations: int = 65536
    batch: int = 8192
    metadata_bytes: int = 48 * 2**20
    wait_s: float = 24 * 3600.0
    exit_s: float = 30.0
    cohorts: int = 1024
    name_bytes: int = 256
