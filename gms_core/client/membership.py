"""A process's place in the cohort of its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from gms_core.client.session import Session
from gms_core.protocol.messages import AwaitRole, Beat, Depart, Done, Elect, Elected, Join, Order, Orders, Report, Role


class Membership:
    """A session whose process has joined a cohort: when the session ends without `depart`, the server ends every process of the cohort.

    Attributes:
        session: The connection. A request that waits, such as `elect`, keeps others of the same session waiting: use a membership for each.
        cohort: The cohort's name.
    """

    def __init__(self, session: Session, cohort: str) -> None:
        self.session = session
        self.cohort = cohort

    @classmethod
    def join(cls, session: Session, cohort: str, engine: str, process: str, *, deadline_s: float = 0.0, serves: bool = False) -> Self:
        """Join a cohort, which the first to join it makes.

        Args:
            session: Becomes the membership's own.
            cohort: The same random text in all processes of one engine.
            engine: What people call the engine.
            process: Which of its processes this is, such as ``rank 0``.
            deadline_s: Seconds without `beat` or `report` after which the cohort is fenced; 0 for no such watch.
            serves: Whether this process accepts and answers requests.

        Raises:
            CohortFenced: The cohort is being ended.
            PermissionRefused: The server cannot watch or end this process.
        """
        session.join(Join(cohort, engine, process, deadline_s, serves))
        return cls(session, cohort)

    def report(self, role: Role, detail: str = "") -> Order:
        """Say what the engine is now; returns what an operator wants of it."""
        return self.session.ask(Report(role, detail), Orders).wanted

    def beat(self) -> None:
        """Say that the engine makes progress."""
        self.session.perform(Beat())

    def depart(self, grace_s: float) -> None:
        """Say that the whole cohort ends in an orderly way within so many seconds."""
        self.session.perform(Depart(grace_s))

    def elect(self, lock: str, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> int:
        """Get a lock that the server arbitrates; returns its term.

        Raises:
            AcquireTimeout: It was not granted in time.
        """
        return self.session.ask(Elect(lock, timeout_s), Elected, timeout_s, on_wait).term

    def await_role(self, role: Role, timeout_s: float, on_wait: Callable[[str], None] | None = None) -> None:
        """Wait until the engine has this role.

        Raises:
            AcquireTimeout: It did not have it in time.
        """
        self.session.ask(AwaitRole(role, timeout_s), Done, timeout_s, on_wait)

    def close(self) -> None:
        """End the session. Idempotent."""
        self.session.close()
