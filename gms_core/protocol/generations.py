"""Messages about the generations of a published pool: pins, rollbacks, and readers that move to another one."""

from __future__ import annotations

from gms_core.layout import Identity
from gms_core.protocol.base import Message

FEATURE = "generations"
"""Stands among the features of a server that knows these messages. To one that does not they are a broken protocol, which ends the connection."""


class AwaitGeneration(Message, frozen=True, tag="await_generation"):
    """Wait until a generation later than ``after`` is committed; answered by `Newer`. With a timeout of 0 it asks whether there is one."""

    pool: str
    after: int
    timeout_s: float


class Newer(Message, frozen=True, tag="newer"):
    """The committed generation.

    Attributes:
        digest: Of its layout: equal digests have equal offsets and manifests.
        identity: What its bytes are.
        size: Bytes of physical memory.
        extent: Bytes of addresses.
    """

    pool: str
    generation: int
    digest: str
    identity: Identity
    size: int
    extent: int


class BeginMove(Message, frozen=True, tag="begin_move"):
    """Let the session, which reads an older generation, have the committed one too; answered by `ReadGranted`.

    It may export the allocations of both, by their ids, until `EndMove`. Where it reads the committed one already, nothing changes.

    Attributes:
        identity: What the caller expects.
        generation: The one that it means; 0 for whichever is committed.
    """

    pool: str
    identity: Identity
    generation: int = 0


class EndMove(Message, frozen=True, tag="end_move"):
    """Of the two generations that `BeginMove` gave the session, it keeps this one."""

    pool: str
    generation: int


class Pin(Message, frozen=True, tag="pin"):
    """Keep a generation, committed or older, without readers."""

    pool: str
    generation: int


class Unpin(Message, frozen=True, tag="unpin"):
    """Keep a generation no more than any other: it is freed if it is not the committed one and nobody reads it."""

    pool: str
    generation: int


class Rollback(Message, frozen=True, tag="rollback"):
    """Publish the layout of an older generation once more, as a new generation with the same memory; answered by `RolledBack`.

    Attributes:
        to: The older generation.
        expected: The committed generation as the caller knows it; 0 if there is none.
        number: The caller's own number of this request, from 1: asked again, with the same number, the server answers as before.
    """

    pool: str
    to: int
    expected: int
    number: int = 0


class RolledBack(Message, frozen=True, tag="rolled_back"):
    """The layout of the older generation is the committed one, under this number."""

    pool: str
    generation: int


class DropGeneration(Message, frozen=True, tag="drop_generation"):
    """Free a generation that nobody reads and that is not pinned, the committed one too."""

    pool: str
    generation: int


GenerationRequest = AwaitGeneration | BeginMove | EndMove | Pin | Unpin | Rollback | DropGeneration
