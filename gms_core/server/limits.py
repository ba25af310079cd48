"""What one client may cost: every bound of the server, in one place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from gms_core.errors import InvalidArgument, LeaseConflict, QuotaExceeded
from gms_core.layout import Identity


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a device server.

    Attributes:
        handshake_s: Seconds from connecting to a complete first message.
        handshakes: Connections of one user at a time that have not shaken hands.
        frame_s: Seconds from a request's first byte to its last.
        send_s: Seconds for which a peer may take no byte of a reply.
        hello_bytes: Bytes of the first message.
        received_bytes: Of requests of one user that have arrived, on all its connections, and were not looked at yet.
        sessions: Connections at a time.
        pools: Names of pools.
        pins: Generations of one pool that are kept without readers.
        allocations: Allocations in all pools together.
        memory_waiters: Requests that may wait for memory at a time.
        batch: Allocations of one request.
        identity_bytes: Of an identity, which status tells of every generation.
        metadata_bytes: Of an identity and a manifest together; less than a message may have, since readers get them in one.
        wait_s: Seconds that a request may ask to wait.
        exit_s: Seconds from SIGKILL to a process's exit, after which whoever waits for its memory is told that it cannot be ended.
        cohorts: Cohorts at a time.
        grace_s: Seconds after a server's start in which the sessions of the one before can be resumed.
        keep_s: Seconds for which memory is kept without a server, and so for which clients look for the next one.
        name_bytes: Bytes of a name that a client gives to something.
    """

    handshake_s: float = 5.0
    handshakes: int = 4096
    frame_s: float = 30.0
    send_s: float = 30.0
    hello_bytes: int = 4096
    received_bytes: int = 2**30
    sessions: int = 16384
    pools: int = 256
    pins: int = 256
    allocations: int = 65536
    memory_waiters: int = 256
    batch: int = 8192
    identity_bytes: int = 64 * 2**10
    metadata_bytes: int = 48 * 2**20
    wait_s: float = 24 * 3600.0
    exit_s: float = 30.0
    cohorts: int = 1024
    grace_s: float = 30.0
    keep_s: float = 120.0
    name_bytes: int = 256

    def within(self, files: int) -> Limits:
        """The same bounds for a process that may open so many files: connections leave room for memory, and for the processes that are watched."""
        if files < 0:  # without a limit
            return self
        return replace(self, sessions=min(self.sessions, max(1, files // 4)), handshakes=min(self.handshakes, max(1, files // 8)))


def check_name(name: str, *, others: Collection[str]) -> None:
    """Refuse what cannot be the name of a pool, or is that of a pool of the other class."""
    if not (0 < len(name) <= 64 and name.replace("_", "").replace("-", "").replace(".", "").isalnum() and name.isascii()):
        raise InvalidArgument(f"{name[:70]!r} is not a name of a pool", hint="Use up to 64 letters, digits, '.', '_' and '-'.")
    if name in others:
        raise LeaseConflict(f"pool {name!r} is of the other class: weights are published, KV memory is retained", hint="Use another tag.")


def check_pins(limits: Limits, pool: str, pins: Collection[int]) -> None:
    """Refuse one more pin of a pool that has as many as it may."""
    if len(pins) >= limits.pins:
        raise QuotaExceeded(f"{limits.pins} generations of pool {pool!r} are pinned already", hint="gms pool unpin gives one of them up.")


def check_metadata(limits: Limits, identity: Identity, manifest: bytes = b"") -> None:
    """Refuse metadata that is too large."""
    own = metadata_bytes(identity)
    if own > limits.identity_bytes:
        raise QuotaExceeded(f"an identity of {own} bytes is over the limit of {limits.identity_bytes}", hint="A digest of what is long says as much.")
    if (size := own + len(manifest)) > limits.metadata_bytes:
        raise QuotaExceeded(f"{size} bytes of metadata are over the limit of {limits.metadata_bytes}")


def check_label(name: str, what: str, limits: Limits) -> None:
    """Refuse what cannot be a name that people read, in a line of a log and on a terminal."""
    if not name or len(name.encode()) > limits.name_bytes or not name.isprintable():
        raise InvalidArgument(f"the name of {what} has 1 to {limits.name_bytes} bytes, all of them printable")


def printable(text: str, limits: Limits) -> str:
    """A client's words, as long as a name at most, with nothing that would end the line of a log or that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[: limits.name_bytes])


def metadata_bytes(identity: Identity, manifest: bytes = b"") -> int:
    """Bytes of an identity and a manifest, or a plan, together."""
    return len(manifest) + sum(len(name.encode()) + len(value.encode()) for name, value in identity.fields.items())
