"""What a store has to do for a lock. Each question has one of three outcomes: yes, no, and that nobody knows, which is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """Who has a lock, as the store shows it to people and to others who want it.

    Attributes:
        engine: What people call the engine.
        cohort: Its cohort.
        pid: Of its first API server.
        host: Name of its machine.
        token: Random; of this election alone.
    """

    engine: str
    cohort: str
    pid: int
    host: str
    token: str

    def __str__(self) -> str:
        return f"{self.engine} (pid {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True)
class Taken:
    """The lock is ours.

    Attributes:
        term: Higher than that of each owner before, for as long as the store keeps its data.
    """

    term: int


@dataclass(frozen=True, slots=True)
class Owned:
    """The lock is somebody else's.

    Attributes:
        owner: Who that is, in words.
    """

    owner: str


class LockStore(Protocol):
    """One lock in one store, for one candidate. It is used by one thread at a time. No call takes much longer than a quarter of the time to live.

    Attributes:
        look_s: Seconds between two looks at whether a lock is still somebody else's: so much longer than necessary may a failover take.

    What is raised by a call that may have reached the store says nothing on whether it was carried out. Each may be repeated.
    """

    look_s: float

    def take(self) -> Taken | Owned:
        """Take the lock if it is nobody's, or ours by an earlier call whose outcome was not known.

        Raises:
            LockStoreUnavailable: The store does not answer, or not soon enough.
            PermissionRefused: It does not let this client in.
            ConfigurationError: It cannot have such a lock.
        """

    def renew(self) -> bool:
        """Have the lock for another time to live, from now on; returns whether it was ours still. If not, it is never again.

        Raises:
            GmsError: As `take`.
        """

    def release(self) -> None:
        """Let others have the lock at once, if it is ours.

        Raises:
            GmsError: As `take`.
        """

    def close(self) -> None:
        """Close the connections. Idempotent."""
