"""Messages of engines that fail over: cohorts, roles, locks, and retained pools."""

from __future__ import annotations

from gms_core.layout import Allocation, Identity
from gms_core.protocol.base import Message, Order, Role


class Join(Message, frozen=True, tag="join"):
    """The session's process belongs to this cohort from now on, and lives and dies with it; answered by `Joined`. The server keeps a pidfd of it.

    Attributes:
        cohort: The same random text in every process of one instance of an engine.
        engine: What people call the engine, such as ``engine-1``.
        process: Which of its processes this is, such as ``api-server 0``, ``engine-core`` or ``rank 3``.
        deadline_s: If not 0, the cohort is fenced once this session has sent neither `Report` nor `Beat` for so many seconds.
        serves: Whether this process accepts and answers requests. Once all that do have exited, nobody can hear of their engine any more.
    """

    cohort: str
    engine: str
    process: str
    deadline_s: float = 0.0
    serves: bool = False


class Joined(Message, frozen=True, tag="joined"):
    """Answer to `Join`, with a descriptor in the ancillary data if ``notice`` is set.

    Attributes:
        notice: The descriptor is of a page for `gms_core.death_notice`; the client says `WillNotify` once the kernel will give the notice in it.
    """

    notice: bool = False


class WillNotify(Message, frozen=True, tag="will_notify"):
    """The kernel gives notice of the process's death in the page that came with `Joined`."""


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

    It is granted in order of arrival, and only once the process that had it has exited. Nothing else ends it.
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
        front: Indices in ``sizes`` of the allocations that make up the front, of which there are to be two; none: there is no bridge.
    """

    pool: str
    plan: bytes
    sizes: tuple[int, ...]
    timeout_s: float = 0.0
    front: tuple[int, ...] = ()


class Planned(Message, frozen=True, tag="planned"):
    """The session uses the pool: it may ask for descriptors with `Export`, and for the pool itself with `Hold`.

    Attributes:
        plan: As it was provided.
        allocations: In arena order, side by side from offset 0.
        epoch: The last one that was granted; 0 if the memory was never held.
        spares: The second front: for some of the allocations another one of the same offset and size.
    """

    pool: str
    plan: bytes
    allocations: tuple[Allocation, ...]
    epoch: int
    spares: tuple[Allocation, ...] = ()


class Hold(Message, frozen=True, tag="hold"):
    """Ask to be the one holder of a retained pool; answered by `Held`.

    It is granted once every process of the cohort that held it before has exited, or that cohort has released it. Before it, nobody but the holder
    may map the memory.

    Attributes:
        bridge: The session can begin with the front alone. It is granted earlier then: once the cohort that held the pool before is being ended and
            every process of it that serves has exited.
    """

    pool: str
    timeout_s: float
    bridge: bool = False


class Drop(Message, frozen=True, tag="drop"):
    """Free the memory of a retained pool that nobody uses, and forget its plan."""

    pool: str


class Held(Message, frozen=True, tag="held"):
    """The session's cohort holds the pool.

    Attributes:
        epoch: +1 with each grant.
        turn: Which front the holder has: 0 for the one among ``allocations`` of the plan, 1 for ``spares``.
        whole: Whether it may map all of the memory; else the front alone, until `AwaitWhole` is answered.
    """

    pool: str
    epoch: int
    turn: int = 0
    whole: bool = True


class AwaitWhole(Message, frozen=True, tag="await_whole"):
    """Wait until the holder may map all of the memory: every process of the cohorts that held it before has exited. Answered by `Done`."""

    pool: str
    timeout_s: float
