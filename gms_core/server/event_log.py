"""The last events of a device server, numbered, in bounded memory. No I/O."""

from __future__ import annotations

import heapq
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import takewhile

from gms_core.events import Kind
from gms_core.protocol.observation import Event

RARE = 4096
"""Events kept that there are few of."""
FREQUENT = 1024
"""Events kept of the kinds that there are as many of as clients: beside the others, so that a thousand readers displace no commit."""


class EventLog:
    """Keeps the last events.

    Attributes:
        name: A random text: another server's log has another one.
        last: Number of the last event; 0 if there was none.
        counts: How many events there were of each kind.
    """

    def __init__(
        self, rare: int = RARE, frequent: int = FREQUENT, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with none.

        Args:
            rare: How many of the rare kinds to keep.
            frequent: How many of the others to keep.
            wall: The clock of people.
            monotonic: The clock that never goes back.
        """
        self.name = secrets.token_hex(8)
        self.last = 0
        self.counts: Counter[Kind] = Counter()
        self._kept: tuple[deque[Event], deque[Event]] = (deque(maxlen=rare), deque(maxlen=frequent))
        self._wall, self._monotonic = wall, monotonic

    def add(self, kind: Kind, subject: str, facts: dict[str, str | int | float | bool]) -> Event:
        """Note an event. The facts are the event's from now on."""
        self.last += 1
        self.counts[kind] += 1
        event = Event(self.last, self._wall(), self._monotonic(), kind, subject, facts)
        self._kept[kind.frequent].append(event)
        return event

    def after(self, number: int, most: int) -> tuple[list[Event], int, int]:
        """Events after the one with this number.

        Args:
            number: Of the last one that was seen; 0 for none.
            most: How many to give at most.

        Returns:
            The oldest of them that are kept; the number of the last event that this covers; and how many of those it covers are not kept any more.
        """
        new = [list(takewhile(lambda event: event.number > number, reversed(kept))) for kept in self._kept]
        found = list(heapq.merge(*(reversed(events) for events in new), key=lambda event: event.number))
        covered = max(number, self.last) if len(found) <= most else found[most - 1].number
        return found[:most], covered, covered - number - min(len(found), most)
