"""What an engine and its elector tell each other: JSON, a line each, over the elector's standard input and output."""

from __future__ import annotations

import time

import msgspec


def now() -> float:
    """Seconds of a clock that nobody sets, that goes on while the machine sleeps, and that all its processes share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Order(msgspec.Struct, frozen=True):
    """The engine's first line: who asks for which lock.

    Attributes:
        lock: As the configuration names it.
        engine: What people call the engine.
        cohort: Its cohort.
        pid: Of the process that asks.
        process: Descriptor, a pidfd, of that process.
        sockets: Of the servers that know the cohort.
    """

    lock: str
    engine: str
    cohort: str
    pid: int
    process: int
    sockets: tuple[str, ...]


class Waits(msgspec.Struct, frozen=True, tag="waits"):
    """The lock cannot be had yet, for this reason."""

    reason: str


class Elected(msgspec.Struct, frozen=True, tag="elected"):
    """The lock is the engine's: with this term, until this time of `now`."""

    term: int
    until: float


class Renewed(msgspec.Struct, frozen=True, tag="renewed"):
    """The lock is the engine's until this time of `now`."""

    until: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The lock can never be had."""

    code: str
    sentence: str
    hint: str


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """The lock is the engine's, but could not be renewed, for this reason."""

    reason: str


class Over(msgspec.Struct, frozen=True, tag="over"):
    """The engine must not serve any more, and is killed, for this reason."""

    reason: str


Told = Waits | Elected | Renewed | Refused | Trouble | Over

RELEASE = b"release\n"
"""The engine's other line: it gives the lock back."""
