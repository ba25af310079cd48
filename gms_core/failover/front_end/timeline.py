"""What happened when in one promotion, in one line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec

from gms_core.failover.front_end.engine import RankMemory
from gms_core.failover.status import Promoted


class Timeline(msgspec.Struct, frozen=True):
    """One promotion, as the log line shows it.

    Attributes:
        event: Always ``promoted``.
        elected_at: Seconds since 1970 at which the engine had the lock. All times in milliseconds are since then.
        elected_clock_s: The same instant in seconds of this machine's monotonic clock, which all its processes share.
        held_ms: When the last rank was granted the memory, which is when every process of the engine before had exited; or the bridge, which is
            before that.
        mapped_ms: When the last rank had it mapped.
        promoted_ms: When the front end knew that.
        listening_ms: When clients could connect, or were let in.
    """

    event: str
    engine: str
    term: int
    epoch: int
    elected_at: float
    elected_clock_s: float
    held_ms: float
    mapped_ms: float
    promoted_ms: float
    listening_ms: float

    def line(self) -> str:
        """The figures as ``key=value`` pairs."""
        pairs = msgspec.structs.asdict(self)
        pairs |= {name: f"{pairs[name]:.6f}" for name in ("elected_at", "elected_clock_s")}
        return "gms " + " ".join(f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}" for key, value in pairs.items())


class Clock:
    """Takes the times of one promotion."""

    def __init__(self) -> None:
        self._elected_at = 0.0
        self._elected = 0.0
        self._promoted = 0.0
        self._held_s = 0.0
        self._mapped_s = 0.0

    def elected(self) -> None:
        """The engine has the lock."""
        self._elected_at, self._elected = time.time(), time.monotonic()

    def promoted(self, asked: float, ranks: Sequence[RankMemory]) -> Promoted:
        """The ranks have their memory.

        Args:
            asked: When they were asked, on the monotonic clock.
            ranks: What each of them has.
        """
        self._promoted = time.monotonic()
        self._held_s = asked - self._elected + max(rank.hold_s for rank in ranks)
        self._mapped_s = asked - self._elected + max(rank.hold_s + rank.map_s for rank in ranks)
        return Promoted(
            {f"rank {rank.rank}": rank.epoch for rank in ranks},
            {
                "bytes": sum(rank.bytes for rank in ranks),
                "hold_s": max(rank.hold_s for rank in ranks),
                "map_s": max(rank.map_s for rank in ranks),
            },
        )

    def listening(self, engine: str, term: int, epochs: Mapping[str, int]) -> Timeline:
        """Clients can connect."""
        return Timeline(
            event="promoted",
            engine=engine,
            term=term,
            epoch=max(epochs.values(), default=0),
            elected_at=self._elected_at,
            elected_clock_s=self._elected,
            held_ms=self._held_s * 1e3,
            mapped_ms=self._mapped_s * 1e3,
            promoted_ms=(self._promoted - self._elected) * 1e3,
            listening_ms=(time.monotonic() - self._elected) * 1e3,
        )
