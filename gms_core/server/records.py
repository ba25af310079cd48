"""What a device server writes down of its state, for the one that comes after it. A field that is added needs a default: older files lack it."""

from __future__ import annotations

from typing import Literal

import msgspec

from gms_core.layout import Allocation, Identity
from gms_core.protocol.messages import Order, Role
from gms_core.server.effects import SessionId
from gms_core.server.seat import Claim

FORMATS = (1, 2)
"""Of all of them together: those that a server knows, the one in which everything can be said last. It takes nothing over from a later one, and
leaves what there is. 2 is written only while a generation is there that a rollback has made: a server that knows 1 alone, and would take everything
over from it, would free the memory of that one with the generation that it came from.
"""


HolderState = Literal["alive", "mute", "gone"]
"""See `gms_core.server.retained.RetainedPool`."""
CohortState = Literal["alive", "departing", "fencing"]


class About(msgspec.Struct, frozen=True):
    """Whose journal it is.

    Attributes:
        label: Of the keeper that has the memory; see `gms_core.keeper`.
        boot: Names this boot of the machine, and the namespace of its processes' numbers.
        session: Number of the last session.
        allocation: Number of the last allocation.
        restarts: See `gms_core.protocol.observation.Observation`.
        generation: The highest number of a generation of all published pools that were forgotten.
    """

    format: int
    device: str
    label: str
    boot: str
    session: int = 0
    allocation: int = 0
    restarts: dict[str, int] = {}
    generation: int = 0


class DraftRecord(msgspec.Struct, frozen=True):
    """A draft; see `gms_core.server.draft.Draft`."""

    session: SessionId
    generation: int
    sizes: dict[int, int]
    batch: int = 0
    batch_ids: tuple[int, ...] = ()
    renumbers: bool = False


class RollbackRecord(msgspec.Struct, frozen=True):
    """What a session has asked for, by which number of its own, and the generation that came of it."""

    session: SessionId
    to: int
    expected: int
    generation: int
    number: int = 0


class PublishedRecord(msgspec.Struct, frozen=True):
    """A published pool. Its layouts have records of their own, and who reads which is said by the sessions.

    Attributes:
        generation: The last one that was committed.
        committed: The one that new readers get; 0 if there is none.
        retired: Those that are kept by readers or pins.
        pinned: Those that are kept without readers.
        rollbacks: The last one of each session.
        origins: Of each generation that a rollback has made, the one under whose number its layout is written.
    """

    generation: int
    committed: int = 0
    retired: tuple[int, ...] = ()
    draft: DraftRecord | None = None
    pinned: tuple[int, ...] = ()
    rollbacks: tuple[RollbackRecord, ...] = ()
    origins: dict[int, int] = {}

    @property
    def written(self) -> dict[int, int]:
        """A generation of each layout that is there, by the number under which that is written."""
        return {self.origins.get(generation, generation): generation for generation in (self.committed, *self.retired) if generation}


SeatRecord = tuple[int, Claim | None, str]
"""See `gms_core.server.seat.Seat.record`."""


class RetainedRecord(msgspec.Struct, frozen=True):
    """A retained pool; who uses it is said by the sessions."""

    seat: SeatRecord
    identity: Identity | None = None
    plan: bytes = b""
    allocations: tuple[Allocation, ...] = ()
    spares: tuple[Allocation, ...] = ()
    turn: int = 0
    holder_state: HolderState = "alive"
    unproven: Claim | None = None
    planner: Claim | None = None
    planned_identity: Identity | None = None


class MemberRecord(msgspec.Struct, frozen=True):
    """A member of a cohort.

    Attributes:
        started: When its process was started, in ticks of the kernel: with its number that names it for as long as the machine runs.
    """

    session: SessionId
    pid: int
    process: str
    since: float
    serves: bool = False
    exited: bool = False
    deadline_s: float = 0.0
    started: int = 0


class CohortRecord(msgspec.Struct, frozen=True):
    """A cohort. Times are on the monotonic clock, which goes on while the machine does."""

    engine: str
    since: float
    state: CohortState
    role: Role
    role_since: float
    detail: str = ""
    reason: str = ""
    order: Order = ""
    ends_by: float = 0.0
    members: tuple[MemberRecord, ...] = ()


class SessionRecord(msgspec.Struct, frozen=True):
    """A session, which its client may resume.

    Attributes:
        started: As of `MemberRecord`.
        leases: Generation that it reads, by pool.
        uses: Retained pools whose plan it has.
        moves: Generation that it is about to read instead, by pool.
        away_since: When the first server began to wait for its client, on the monotonic clock; 0 if that was there.
    """

    token: str
    pid: int
    uid: int
    gid: int
    client: str
    since: float
    started: int = 0
    leases: dict[str, int] = {}
    uses: tuple[str, ...] = ()
    moves: dict[str, int] = {}
    away_since: float = 0.0


class OwnersRecord(msgspec.Struct, frozen=True):
    """Which user has made what.

    Attributes:
        layouts: Users by generation, by published pool.
        plans: Users by retained pool.
    """

    layouts: dict[str, dict[int, int]] = {}
    plans: dict[str, int] = {}
