"""What a server tells of what has happened at it, and how often."""

from __future__ import annotations

import msgspec

from gms_core.protocol.base import Message


class Events(Message, frozen=True, tag="events"):
    """Ask for events, the oldest first; answered by `EventBatch`, which is empty if there is none in time.

    Attributes:
        log: Which event log the reader has read in; empty, or that of another server, to begin with the oldest event that there is.
        after: Number of the last event that it has seen there.
        timeout_s: Seconds to wait for the first one; 0 does not wait.
    """

    log: str = ""
    after: int = 0
    timeout_s: float = 0.0


class Event(msgspec.Struct, frozen=True, gc=False):
    """A change of state.

    Attributes:
        number: +1 with each event of the log.
        time_s: Seconds since 1970.
        monotonic_s: Seconds of this machine's monotonic clock, which all its processes share.
        kind: One of `gms_core.events.Kind`, or of a later version's.
        subject: What it is about: a pool, an engine, a lock, a session or a device.
        facts: What there is to know of it.
    """

    number: int
    time_s: float
    monotonic_s: float
    kind: str
    subject: str
    facts: dict[str, str | int | float | bool]


class EventBatch(Message, frozen=True, tag="event_batch"):
    """Answer to `Events`.

    Attributes:
        log: Of these events. Each server has its own: that the name is another one says that another server goes on.
        events: In order; not all, if there are very many.
        last: Number of the last event that this answer covers: what to ask for next.
        lost: Events between the one asked for and ``last`` that have been displaced.
    """

    log: str
    events: tuple[Event, ...]
    last: int
    lost: int = 0


class RequestCount(msgspec.Struct, frozen=True):
    """How often a kind of request had an outcome.

    Attributes:
        outcome: ``ok``, the code of the error with which it was refused, ``gone`` (its client was, before the answer) or ``failed``.
    """

    request: str
    outcome: str
    count: int


class Durations(msgspec.Struct, frozen=True):
    """A histogram.

    Attributes:
        bounds_s: Upper bounds in seconds; there is one count more than these.
        counts: How many were within each bound, and over the one before.
        sum_s: Of all.
    """

    bounds_s: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    sum_s: float = 0.0


class Observation(msgspec.Struct, frozen=True):
    """What a server has counted since it was started.

    Attributes:
        log: Name of its event log.
        last: Number of its last event.
        sessions: How many are open.
        events: How many there were, by kind.
        requests: How many were answered.
        fences: From the moment at which the end of an engine began to the exit of its last process, where the server ended it.
        restarts: Times that a server of this device followed one that had not given up what it had, by whether it was ``adopted`` or ``lost``.
    """

    log: str
    last: int
    sessions: int
    events: dict[str, int]
    requests: tuple[RequestCount, ...]
    fences: Durations
    restarts: dict[str, int]
