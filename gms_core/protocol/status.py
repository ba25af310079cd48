"""What a server tells of itself."""

from __future__ import annotations

import msgspec

from gms_core.protocol.base import Message, Order, Role
from gms_core.protocol.observation import Observation


class Status(Message, frozen=True, tag="status"):
    """Ask for `StatusReport`.

    Attributes:
        brief: Whether the sessions may be left out, of which there can be very many.
    """

    brief: bool = False


class GenerationStatus(msgspec.Struct, frozen=True):
    """One generation that is there.

    Attributes:
        committed: Whether it is the one that new readers get; else something keeps it.
        bytes: Of its layout. Generations with one digest may have the same memory.
        readers: Sessions that read it, or are moving to it.
        pinned: Whether it is kept without readers.
    """

    generation: int
    committed: bool
    digest: str
    identity: dict[str, str]
    bytes: int
    readers: tuple[int, ...]
    pinned: bool


class PoolStatus(msgspec.Struct, frozen=True):
    """One pool.

    Attributes:
        state: ``committed``; or else ``writing``; or else ``retired``, where only older generations are kept; or else ``empty``.
        generation: The committed one, or 0.
        bytes: Of the committed layout.
        draft_bytes: Of the layout being written.
        retired_bytes: Of older generations that readers or pins still keep, without what the committed one has too.
        readers: Sessions that read any generation.
        writer: Session that writes, or 0.
        waiting: Sessions in the queue.
        generations: All that are there, the oldest first.
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
    generations: tuple[GenerationStatus, ...] = ()


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


class EndStatus(msgspec.Struct, frozen=True):
    """How a cohort ended. Times are seconds of this machine's monotonic clock, which all its processes share.

    Attributes:
        reason: Why it was ended, or that it ended in an orderly way.
        noticed_s: When the server knew that it ends, and had sent its signals.
        gone_s: When every process of it had exited.
    """

    cohort: str
    engine: str
    reason: str
    noticed_s: float
    gone_s: float


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
    """One session.

    Attributes:
        away: Whether it is of the server before this one, and its client has not come back yet.
    """

    id: int
    pid: int
    uid: int
    client: str
    age_s: float
    leases: dict[str, str]
    waiting_for: str
    away: bool = False


class MemoryWait(msgspec.Struct, frozen=True):
    """A request that waits for memory.

    Attributes:
        bytes: That it asks for.
        waited_s: Seconds since it came.
        passed: Later requests that were served before it since its last turn.
        alone: Whether nobody may pass it now.
    """

    bytes: int
    waited_s: float
    passed: int
    alone: bool


class QuotaStatus(msgspec.Struct, frozen=True):
    """One quota, for one user or pool that it holds for.

    Attributes:
        scope: ``user`` or ``pool``.
        who: The user's number, or the pool's name.
        resource: ``bytes``, ``allocations``, ``metadata`` or ``sessions``.
    """

    scope: str
    who: str
    resource: str
    used: int
    limit: int


class StatusReport(Message, frozen=True, tag="status_report"):
    """The server's state at one instant; ``ends`` are the last cohorts that are gone.

    Attributes:
        observation: What it has counted; None from a version that counts nothing, and has no events.
        cut: Whether something was left out that a message has no room for: identities of older generations first, then sessions and who reads,
            then older generations and all identities.
    """

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
    ends: tuple[EndStatus, ...] = ()
    observation: Observation | None = None
    memory_queue: tuple[MemoryWait, ...] = ()
    quotas: tuple[QuotaStatus, ...] = ()
    cut: bool = False
