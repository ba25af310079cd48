"""The messages of the protocol, version 1.

A client sends one request at a time and reads replies until the one that ends it. `Waiting` may come any number of times before the end;
replies that carry descriptors come in as many frames as the descriptors need, ``more`` on all but the last.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gms_core.layout import Allocation, Identity, Layout

PROTOCOL_VERSION = 1

Mode = Literal["auto", "rw", "ro"]

Role = Literal["init", "standby", "promoting", "primary", "fenced"]
"""What an engine is to its clients; see `gms_core.failover.roles`."""
Order = Literal["", "promote", "demote"]
"""What an operator wants of an engine; empty for nothing."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all messages."""


class Hello(Message, frozen=True, tag="hello"):
    """The first message of a client.

    Attributes:
        versions: Protocol versions that the client speaks.
        client: Who calls, for status and logs, such as ``vllm 0.30.0 rank 0``.
        device: UUID of the device that the client means to reach; empty for whichever the server has.
    """

    versions: tuple[int, ...]
    client: str = ""
    device: str = ""


class Welcome(Message, frozen=True, tag="welcome"):
    """Answer to `Hello`.

    Attributes:
        version: The protocol version of this connection.
        server: The server's package version.
        device: UUID of its device, or ``host``.
        driver: ``cuda`` or ``host``.
        granularity: Bytes; sizes of allocations are multiples of it.
        session: This session's number.
    """

    version: int
    server: str
    device: str
    driver: str
    granularity: int
    session: int


class Acquire(Message, frozen=True, tag="acquire"):
    """Ask for a lease on a published pool.

    Attributes:
        pool: Its name.
        mode: ``rw`` for a write lease, ``ro`` for a read lease, ``auto`` for whichever comes first.
        identity: What the caller expects (a reader) or is about to publish (a writer).
        timeout_s: Seconds to wait at most; 0 does not wait.
        replace: With ``rw``: the committed generation that the new one replaces. Its readers keep it; it is dropped first when it has none.
    """

    pool: str
    mode: Mode
    identity: Identity
    timeout_s: float
    replace: int | None = None


class Waiting(Message, frozen=True, tag="waiting"):
    """Not an answer yet: what the request waits for, in words."""

    reason: str


class WriteGranted(Message, frozen=True, tag="write_granted"):
    """The session is the pool's writer.

    Attributes:
        pool: Its name.
        generation: The number that the commit will carry.
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
    """

    pool: str
    sizes: tuple[int, ...]
    timeout_s: float = 0.0


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
    """

    pool: str
    allocations: tuple[Allocation, ...]
    manifest: bytes
    identity: Identity


class Release(Message, frozen=True, tag="release"):
    """Give up the session's lease on a pool, or its use of a retained pool. A draft is dropped; retained memory stays.

    Whoever releases a pool that it holds has unmapped it, and its device has finished all work on it.
    """

    pool: str


class Join(Message, frozen=True, tag="join"):
    """The session's process belongs to this cohort from now on, and lives and dies with it. The server keeps a pidfd of it.

    Attributes:
        cohort: The same random text in every process of one instance of an engine.
        engine: What people call the engine, such as ``engine-1``.
        process: Which of its processes this is, such as ``api-server 0``, ``engine-core`` or ``rank 3``.
        deadline_s: If not 0, the cohort is fenced once this session has sent neither `Report` nor `Beat` for so many seconds.
    """

    cohort: str
    engine: str
    process: str
    deadline_s: float = 0.0


class Report(Message, frozen=True, tag="report"):
    """What the engine is now, as its first API server knows it; answered by `Orders`. It is a beat too.

    Attributes:
        role: The cohort's role from now on.
        detail: Words for people, such as why it is fenced.
    """

    role: Role
    detail: str = ""


class Beat(Message, frozen=True, tag="beat"):
    """The session's process, and what it watches over, make progress."""


class Orders(Message, frozen=True, tag="orders"):
    """Answer to `Report`: what an operator wants of the engine. An order stands until the engine's role has changed."""

    wanted: Order


class Depart(Message, frozen=True, tag="depart"):
    """The whole cohort is about to end in an orderly way: that its connections close is no fault, unless it takes longer than this.

    Attributes:
        grace_s: Seconds until the server ends what is left of it.
    """

    grace_s: float


class Elect(Message, frozen=True, tag="elect"):
    """Ask for a lock that elects the primary; answered by `Elected`.

    It is granted in order of arrival, and only once the process that had it has exited or released it. It ends with the session's process.
    """

    lock: str
    timeout_s: float


class Elected(Message, frozen=True, tag="elected"):
    """The session's cohort has the lock.

    Attributes:
        term: +1 with each election of this lock.
    """

    lock: str
    term: int


class AwaitRole(Message, frozen=True, tag="await_role"):
    """Wait until the session's cohort has this role; answered by `Done`."""

    role: Role
    timeout_s: float


class Instruct(Message, frozen=True, tag="instruct"):
    """An operator's order to the engine of a cohort; it gets it with its next `Orders`."""

    cohort: str
    order: Order


class Plan(Message, frozen=True, tag="plan"):
    """Ask how large a retained pool is, and use it; answered by `Planned`, or by `PlanDue` if this session has to say so.

    Memory of another identity that nobody uses any more is freed, and planned anew.

    Attributes:
        identity: What the memory is laid out for.
    """

    pool: str
    identity: Identity
    timeout_s: float


class PlanDue(Message, frozen=True, tag="plan_due"):
    """Nobody has planned the pool: this session does it with `Provide`, and others wait until it has, or is gone."""

    pool: str


class Provide(Message, frozen=True, tag="provide"):
    """Create the memory of a retained pool; answered by `Planned`.

    Attributes:
        plan: What every later user adopts; the server does not look into it.
        sizes: Bytes of each allocation in arena order, multiples of the granularity.
        timeout_s: Seconds to wait for memory that another process is releasing.
    """

    pool: str
    plan: bytes
    sizes: tuple[int, ...]
    timeout_s: float = 0.0


class Planned(Message, frozen=True, tag="planned"):
    """The session uses the pool: it may ask for descriptors with `Export`, and for the pool itself with `Hold`.

    Attributes:
        plan: As it was provided.
        allocations: In arena order, side by side from offset 0.
        epoch: The last one that was granted; 0 if the memory was never held.
    """

    pool: str
    plan: bytes
    allocations: tuple[Allocation, ...]
    epoch: int


class Hold(Message, frozen=True, tag="hold"):
    """Ask to be the one holder of a retained pool; answered by `Held`.

    It is granted once every process of the cohort that held it before has exited, or that cohort has released it. Before it, nobody but the holder
    may map the memory.
    """

    pool: str
    timeout_s: float


class Held(Message, frozen=True, tag="held"):
    """The session's cohort holds the pool.

    Attributes:
        epoch: +1 with each grant.
    """

    pool: str
    epoch: int


class Status(Message, frozen=True, tag="status"):
    """Ask for `StatusReport`."""


class PoolStatus(msgspec.Struct, frozen=True):
    """One pool.

    Attributes:
        state: ``empty``, ``writing`` or ``committed``.
        generation: The committed one, or 0.
        bytes: Of the committed layout.
        draft_bytes: Of the layout being written.
        retired_bytes: Of older generations that readers still keep.
        readers: Sessions that read any generation.
        writer: Session that writes, or 0.
        waiting: Sessions in the queue.
    """

    name: str
    state: str
    generation: int
    digest: str
    identity: dict[str, str]
    allocations: int
    bytes: int
    draft_bytes: int
    retired_bytes: int
    readers: tuple[int, ...]
    writer: int
    waiting: tuple[int, ...]


class RetainedStatus(msgspec.Struct, frozen=True):
    """One retained pool.

    Attributes:
        state: ``empty``, ``planning``, ``free`` (nobody holds it), ``held`` or ``fencing`` (its last holder is being ended).
        epoch: The last one that was granted.
        holder: Cohort that holds it; empty if none.
        users: Sessions that may ask for it.
        waiting: Sessions that have asked.
    """

    name: str
    state: str
    epoch: int
    identity: dict[str, str]
    allocations: int
    bytes: int
    holder: str
    users: tuple[int, ...]
    waiting: tuple[int, ...]


class MemberStatus(msgspec.Struct, frozen=True):
    """One process of a cohort."""

    pid: int
    process: str
    age_s: float


class CohortStatus(msgspec.Struct, frozen=True):
    """One cohort.

    Attributes:
        name: The random text.
        engine: What people call it.
        state: ``alive``, ``departing`` or ``fencing``.
        role: As its first API server last said.
        role_age_s: Seconds for which it has had that role.
        detail: Words to the role.
        reason: Why it is being ended; empty if it is not.
        order: What an operator wants of it, and it has not done yet.
        silent_s: Seconds since the last beat of the session that has been silent for the longest; -1 if none has a deadline.
    """

    name: str
    engine: str
    state: str
    role: Role
    role_age_s: float
    detail: str
    reason: str
    order: Order
    age_s: float
    silent_s: float
    members: tuple[MemberStatus, ...]


class LockStatus(msgspec.Struct, frozen=True):
    """One lock that the server arbitrates.

    Attributes:
        owner: Cohort that has it; empty if none.
        waiting: Cohorts that have asked, in the order in which they will get it.
    """

    name: str
    term: int
    owner: str
    waiting: tuple[str, ...]


class SessionStatus(msgspec.Struct, frozen=True):
    """One session."""

    id: int
    pid: int
    uid: int
    client: str
    age_s: float
    leases: dict[str, str]
    waiting_for: str


class StatusReport(Message, frozen=True, tag="status_report"):
    """The server's state at one instant."""

    server: str
    pid: int
    device: str
    driver: str
    uptime_s: float
    memory_free: int
    memory_total: int
    allocated_bytes: int
    allocations: int
    waiting_for_memory: int
    pools: tuple[PoolStatus, ...]
    sessions: tuple[SessionStatus, ...]
    retained: tuple[RetainedStatus, ...] = ()
    cohorts: tuple[CohortStatus, ...] = ()
    locks: tuple[LockStatus, ...] = ()


class Done(Message, frozen=True, tag="done"):
    """The request was carried out and has nothing to tell."""


class Failure(Message, frozen=True, tag="failure"):
    """The request was refused; see `gms_core.errors`."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, str] = {}


Request = (
    Hello
    | Acquire
    | Allocate
    | Export
    | Discard
    | Commit
    | Release
    | Join
    | Report
    | Beat
    | Depart
    | Elect
    | AwaitRole
    | Instruct
    | Plan
    | Provide
    | Hold
    | Status
)
Reply = (
    Welcome | Waiting | WriteGranted | ReadGranted | Descriptors | Orders | Elected | PlanDue | Planned | Held | StatusReport | Done | Failure
)
