"""The generations of a published pool, as an operator, a trainer or a watching thread sees them: without a lease."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from gms_core.client.dial import require
from gms_core.client.session import Session
from gms_core.errors import AcquireTimeout
from gms_core.protocol.generations import FEATURE, AwaitGeneration, DropGeneration, Newer, Pin, Rollback, RolledBack, Unpin
from gms_core.protocol.messages import GenerationStatus, Status, StatusReport

_numbers = itertools.count(1)
"""Of this process's rollbacks."""


class PoolGenerations:
    """What can be done about a pool's generations. Each call raises `VersionMismatch` if an older server has followed that knows nothing of it.

    Attributes:
        name: The pool's name.
    """

    def __init__(self, session: Session, name: str) -> None:
        """Do nothing yet.

        Raises:
            VersionMismatch: The server is too old for all of this.
        """
        require(session.welcome, FEATURE)
        self.name = name
        self._session = session

    def all(self) -> tuple[GenerationStatus, ...]:
        """All that are there, the oldest first."""
        require(self._session.welcome, FEATURE)  # an older server has generations too, and tells of none
        report = self._session.ask(Status(brief=True), StatusReport)
        return next((pool.generations for pool in report.pools if pool.name == self.name), ())

    def newer(self, after: int) -> Newer | None:
        """The committed generation if it is later than this one."""
        try:
            return self.await_newer(after, 0.0)
        except AcquireTimeout:
            return None

    def await_newer(self, after: int, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> Newer:
        """Wait until a generation later than this one is committed. A session does one thing at a time: what waits long has one of its own.

        Raises:
            AcquireTimeout: None was in time.
        """
        return self._session.ask(AwaitGeneration(self.name, after, timeout_s), Newer, timeout_s, on_wait)

    def pin(self, generation: int) -> None:
        """Keep a generation, committed or older, without readers.

        Raises:
            GenerationNotFound: It is not there.
        """
        self._session.perform(Pin(self.name, generation))

    def unpin(self, generation: int) -> None:
        """Keep it no more than any other: it is freed if it is not the committed one and nobody reads it.

        Raises:
            GenerationNotFound: It is not there.
        """
        self._session.perform(Unpin(self.name, generation))

    def rollback(self, to: int, *, expected: int) -> int:
        """Publish the layout of an older generation once more. Nothing is copied: the new generation has the same memory.

        Args:
            to: The older generation, which readers or a pin have kept.
            expected: The committed generation as the caller knows it; 0 if there is none.

        Returns:
            The number of the new generation.

        Raises:
            GenerationConflict: Another one is committed.
            GenerationNotFound: There is no generation ``to`` any more.
        """
        return self._session.ask(Rollback(self.name, to, expected, next(_numbers)), RolledBack).generation

    def drop(self, generation: int) -> None:
        """Free a generation that nobody reads and that is not pinned, the committed one too.

        Raises:
            GenerationNotFound: It is not there.
            LeaseConflict: Somebody reads it, or it is pinned.
        """
        self._session.perform(DropGeneration(self.name, generation))
