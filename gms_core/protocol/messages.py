"""The messages of the protocol, versions 1 and 2.

A client sends one request at a time and reads replies until the one that ends it. `Waiting` may come any number of times before the end;
replies that carry descriptors come in as many frames as the descriptors need, ``more`` on all but the last.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from gms_core.layout import Allocation, Identity, Layout
from gms_core.protocol.base import Message, Mode, Order, Role
from gms_core.protocol.engines import (
    AwaitRole,
    AwaitWhole,
    Beat,
    Depart,
    Drop,
    Elect,
    Elected,
    Held,
    Hold,
    Instruct,
    Join,
    Joined,
    Orders,
    Plan,
    PlanDue,
    Planned,
    Provide,
    Report,
    WillNotify,
)
from gms_core.protocol.generations import (
    AwaitGeneration,
    BeginMove,
    DropGeneration,
    EndMove,
    Newer,
    Pin,
    Rollback,
    RolledBack,
    Unpin,
)
from gms_core.protocol.observation import Durations, Event, EventBatch, Events, Observation, RequestCount
from gms_core.protocol.status import (
    CohortStatus,
    EndStatus,
    GenerationStatus,
    LockStatus,
    MemberStatus,
    MemoryWait,
    PoolStatus,
    QuotaStatus,
    RetainedStatus,
    SessionStatus,
    Status,
    StatusReport,
)

PROTOCOL_VERSIONS = (2, 1)
"""Those that both sides of this package speak, the best first. With 2 a session can be resumed at the server that follows a killed one."""


def common_version(versions: Iterable[int]) -> int:
    """The best version that this package and a peer speak; 0 if there is none."""
    return max(set(versions) & set(PROTOCOL_VERSIONS), default=0)


class Hello(Message, frozen=True, tag="hello"):
    """The first message of a client.

    Attributes:
        versions: Protocol versions that the client speaks.
        client: Who calls, for status and logs, such as ``vllm 0.30.0 rank 0``.
        device: UUID of the device that the client means to reach; empty for whichever the server has.
        resume: The token of a session that another server welcomed, and that this one is to go on with; empty for a new one.
        session: The number of that session.
        repeats: Whether the next request is one that was sent before, and may have been carried out.
    """

    versions: tuple[int, ...]
    client: str = ""
    device: str = ""
    resume: str = ""
    session: int = 0
    repeats: bool = False


class Welcome(Message, frozen=True, tag="welcome"):
    """Answer to `Hello`.

    Attributes:
        version: The protocol version of this connection.
        server: The server's package version.
        device: UUID of its device, or ``host``.
        driver: ``cuda`` or ``host``.
        granularity: Bytes; sizes of allocations are multiples of it.
        session: This session's number.
        token: With which it can be resumed; empty if it cannot be.
        grace_s: Seconds for which another server may follow this one.
        features: What the server can do beyond the version: ``generations`` for the requests of `gms_core.protocol.generations`; and `STAYS`.
    """

    version: int
    server: str
    device: str
    driver: str
    granularity: int
    session: int
    token: str = ""
    grace_s: float = 0.0
    features: tuple[str, ...] = ()


class Acquire(Message, frozen=True, tag="acquire"):
    """Ask for a lease on a published pool.

    Attributes:
        pool: Its name.
        mode: ``rw`` for a write lease, ``ro`` for a read lease, ``auto`` for whichever comes first.
        identity: What the caller expects (a reader) or is about to publish (a writer).
        timeout_s: Seconds to wait at most; 0 does not wait.
        replace: With ``rw``: the committed generation that the new one replaces. Its readers keep it; it is dropped first when it has none.
        renumbers: Whether a writer takes a later generation at its commit than `WriteGranted` says, when a rollback has taken that meanwhile.
    """

    pool: str
    mode: Mode
    identity: Identity
    timeout_s: float
    replace: int | None = None
    renumbers: bool = False


class Waiting(Message, frozen=True, tag="waiting"):
    """Not an answer yet: what the request waits for, in words."""

    reason: str


class WriteGranted(Message, frozen=True, tag="write_granted"):
    """The session is the pool's writer.

    Attributes:
        pool: Its name.
        generation: The number that the commit will carry; or a later one, if the writer said that it `renumbers`.
    """

    pool: str
    generation: int


class ReadGranted(Message, frozen=True, tag="read_granted"):
    """The session reads this layout until it releases it.

    Attributes:
        layout: The layout; its manifest is left out in the answer to `Commit`.
        sealed: The kernel refuses every new writable mapping of it.
    """

    pool: str
    layout: Layout
    sealed: bool = False


class Allocate(Message, frozen=True, tag="allocate"):
    """Create memory in the draft that this session writes; answered by `Descriptors`.

    Attributes:
        sizes: Bytes of each allocation, multiples of the granularity.
        timeout_s: Seconds to wait for memory that another process is releasing.
        batch: The writer's own number of this request, from 1: asked for the same one again, the server answers with what it has made.
    """

    pool: str
    sizes: tuple[int, ...]
    timeout_s: float = 0.0
    batch: int = 0


class Export(Message, frozen=True, tag="export"):
    """Ask for descriptors of allocations that the session's lease covers, or of a retained pool that it uses; answered by `Descriptors`.

    Empty ``ids`` means all, in arena order.
    """

    pool: str
    ids: tuple[int, ...] = ()


class Descriptors(Message, frozen=True, tag="descriptors"):
    """Allocations, with one descriptor each in the same order in the ancillary data."""

    ids: tuple[int, ...]
    sizes: tuple[int, ...]
    more: bool = False


class Discard(Message, frozen=True, tag="discard"):
    """Free allocations of the draft."""

    pool: str
    ids: tuple[int, ...]


class Commit(Message, frozen=True, tag="commit"):
    """Publish the draft and turn the write lease into a read lease, at once; answered by `ReadGranted`.

    Attributes:
        allocations: All that stays, in arena order. Allocations of the draft that are not named are freed.
        identity: Replaces the identity of `Acquire`, now that the writer knows all of it.
        pin: Keep the generation without readers too, until `Unpin`.
    """

    pool: str
    allocations: tuple[Allocation, ...]
    manifest: bytes
    identity: Identity
    pin: bool = False


class Release(Message, frozen=True, tag="release"):
    """Give up the session's lease on a pool, or its use of a retained pool. A draft is dropped; retained memory stays.

    Whoever releases a pool that it holds has unmapped it, and its device has finished all work on it.
    """

    pool: str


STAYS = "stays"
"""Stands among the features of a server that hands nothing over: it refuses `HandOver`."""


class HandOver(Message, frozen=True, tag="hand_over"):
    """Ask the server to end and to leave everything to the one that the asking process is about to start; answered by `Done`."""


class Done(Message, frozen=True, tag="done"):
    """The request was carried out and has nothing to tell."""


class Failure(Message, frozen=True, tag="failure"):
    """The request was refused; see `gms_core.errors`."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, str] = msgspec.field(default_factory=dict)


Request = (
    Hello
    | Acquire
    | Allocate
    | Export
    | Discard
    | Commit
    | Release
    | Join
    | WillNotify
    | Report
    | Beat
    | Depart
    | Elect
    | AwaitRole
    | Instruct
    | Plan
    | Provide
    | Hold
    | AwaitWhole
    | Drop
    | AwaitGeneration
    | BeginMove
    | EndMove
    | Pin
    | Unpin
    | Rollback
    | DropGeneration
    | HandOver
    | Status
    | Events
)
Reply = (
    Welcome
    | Joined
    | Waiting
    | WriteGranted
    | ReadGranted
    | Descriptors
    | Orders
    | Elected
    | PlanDue
    | Planned
    | Held
    | Newer
    | RolledBack
    | StatusReport
    | EventBatch
    | Done
    | Failure
)

__all__ = [
    "PROTOCOL_VERSIONS",
    "STAYS",
    "Acquire",
    "Allocate",
    "AwaitGeneration",
    "AwaitRole",
    "AwaitWhole",
    "Beat",
    "BeginMove",
    "CohortStatus",
    "Commit",
    "Depart",
    "Descriptors",
    "Discard",
    "Done",
    "Drop",
    "DropGeneration",
    "Durations",
    "Elect",
    "Elected",
    "EndMove",
    "EndStatus",
    "Event",
    "EventBatch",
    "Events",
    "Export",
    "Failure",
    "GenerationStatus",
    "HandOver",
    "Held",
    "Hello",
    "Hold",
    "Instruct",
    "Join",
    "Joined",
    "LockStatus",
    "MemberStatus",
    "MemoryWait",
    "Message",
    "Mode",
    "Newer",
    "Observation",
    "Order",
    "Orders",
    "Pin",
    "Plan",
    "PlanDue",
    "Planned",
    "PoolStatus",
    "Provide",
    "QuotaStatus",
    "ReadGranted",
    "Release",
    "Reply",
    "Report",
    "Request",
    "RequestCount",
    "RetainedStatus",
    "Role",
    "Rollback",
    "RolledBack",
    "SessionStatus",
    "Status",
    "StatusReport",
    "Unpin",
    "Waiting",
    "Welcome",
    "WillNotify",
    "WriteGranted",
    "common_version",
]
