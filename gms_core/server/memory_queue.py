"""Who waits for memory, and whose turn it is, as a pure state machine.

First come, first served, with one exception that has a limit. To serve in strict order would let one request for nearly the whole device, which has
said that it waits for an hour, keep everybody from memory that lies idle for that hour. To serve whatever fits would let small requests eat up, one
after the other, what is released, and a large one would never have its turn. So later requests that fit may pass an earlier one, but only a few
times; then nobody passes it for a while, in which what is released adds up for it. If that while was too short, some may pass again, and the next
one is twice as long. So a large request gets whatever is released in a minute, and a small one that fits never waits for longer than that minute,
nor for much longer than the large one has waited already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PASSES = 8
"""Requests that may pass an earlier one before it is its turn alone."""
FIRST_TURN_S = 1.0
LONGEST_TURN_S = 60.0
"""Seconds for which nobody passes a request that was passed so often: the first time, and at most."""


@dataclass
class Waiting:
    """A request that waits.

    Attributes:
        ticket: Its number; later ones are higher.
        size: Bytes that it asks for.
        since: When it came, as all times on the caller's clock.
        passed: Later requests that were served since its last turn.
        turn_s: Seconds of its next turn.
        turn_ends: When its turn is over; None if it has none now.
    """

    ticket: int
    size: int
    since: float
    passed: int = 0
    turn_s: float = FIRST_TURN_S
    turn_ends: float | None = None


class MemoryQueue:
    """The requests that wait, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._last = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(tuple(self._waiting))

    def join(self, size: int, now: float) -> int:
        """Wait for memory; returns the ticket."""
        self._last += 1
        self._waiting.append(Waiting(self._last, size, now))
        return self._last

    def next(self, free: int, now: float) -> int | None:
        """The ticket of the request that may have memory now: the first one that fits, unless an earlier one has its turn alone.

        Args:
            free: Bytes that there are.
            now: The time.
        """
        for waiting in self._waiting:
            if waiting.size <= free:
                return waiting.ticket
            if self._alone(waiting, now):
                return None
        return None

    def served(self, ticket: int) -> None:
        """A request has got its memory: it has passed all that came before it and still wait."""
        for waiting in self._waiting:
            if waiting.ticket < ticket:
                waiting.passed += 1
        self.leave(ticket)

    def leave(self, ticket: int) -> None:
        """A request waits no more. One that does not is no error."""
        self._waiting = [waiting for waiting in self._waiting if waiting.ticket != ticket]

    def before(self, ticket: int) -> int:
        """How many came before a request and still wait."""
        return sum(waiting.ticket < ticket for waiting in self._waiting)

    def _alone(self, waiting: Waiting, now: float) -> bool:
        """Whether nobody may pass a request now."""
        if waiting.turn_ends is None:
            if waiting.passed < PASSES:
                return False
            waiting.turn_ends = now + waiting.turn_s
        if now < waiting.turn_ends:
            return True
        waiting.passed, waiting.turn_ends, waiting.turn_s = 0, None, min(2 * waiting.turn_s, LONGEST_TURN_S)
        return False
