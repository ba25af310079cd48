"""For how long an engine may count on its lock, as a pure machine. Times are seconds of one clock that goes on while the machine sleeps.

The store lets others have the lock a time to live after it was asked for the last renewal, at the earliest. Whoever has it is gone by then: its end
begins a margin earlier, which is for noticing that, for the kernel to end the engine's processes, and for clocks that do not run alike.
"""

from __future__ import annotations

RENEWALS = 4
"""How often a lock is renewed within a time to live: so many questions have to go without an answer before an engine is ended."""
MARGIN = 0.25
"""The margin as a part of the time to live."""
LATE = 0.1
"""The part of the time to live after which an engine ends itself that its elector, which may be stopped, should have ended."""


class Validity:
    """Until when a lock is certain to be ours.

    Attributes:
        ttl_s: The time to live.
        renewed_at: When the store was asked for the last renewal that it has granted.
    """

    def __init__(self, ttl_s: float, asked_at: float) -> None:
        """The lock was taken.

        Args:
            ttl_s: The time to live.
            asked_at: When the store was asked for it.
        """
        self.ttl_s = ttl_s
        self.renewed_at = asked_at

    def renewed(self, asked_at: float) -> None:
        """It was renewed.

        Args:
            asked_at: When the store was asked to, not when it answered.
        """
        self.renewed_at = max(self.renewed_at, asked_at)

    @property
    def ends_at(self) -> float:
        """From this time on the engine must not serve, unless the lock is renewed."""
        return self.renewed_at + (1 - MARGIN) * self.ttl_s

    @property
    def runs_out_at(self) -> float:
        """From this time on the store lets others have it."""
        return self.renewed_at + self.ttl_s

    def has_ended(self, now: float) -> bool:
        """Whether the engine must not serve any more."""
        return now >= self.ends_at


def renewal_pause_s(ttl_s: float) -> float:
    """Seconds from the outcome of one renewal to the next."""
    return ttl_s / RENEWALS / 2


def answer_s(ttl_s: float) -> float:
    """Seconds that a store has to answer one question; then another member of it is asked."""
    return ttl_s / RENEWALS / 2
