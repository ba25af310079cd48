"""How long the sessions of the server before are waited for: their clients may be slow, and this server may be killed as well.

What a session has is its own until its time is over. That begins with the first server that waits for it, and does not begin anew with each one that
follows: else servers that are killed again and again would keep what nobody comes back for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from gms_core.server.effects import SessionId
from gms_core.server.sessions import Session

LEAST = 1 / 6
"""Of the grace that each server grants at least, whatever those before it have granted: clients need a moment to find it."""


class Grace:
    """Waits for sessions that are away.

    Args:
        sessions: All of the server.
        grace_s: Seconds that a session has.
        give_up: Called with a session whose time is over; one that it leaves open is asked about again.
    """

    def __init__(self, sessions: Mapping[SessionId, Session], grace_s: float, give_up: Callable[[Session], None]) -> None:
        self._sessions, self._grace_s, self._give_up = sessions, grace_s, give_up
        self._began = time.monotonic()
        self._clock: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Wait for all sessions that are away; clients can connect from now on."""
        self._began = time.monotonic()
        self.wind()

    def wind(self) -> None:
        """A session may be away that was not before."""
        self.close()
        now = time.monotonic()
        ends = [now + self._grace_s if session.overdue else self._end(session) for session in self._away()]
        self._clock = asyncio.get_running_loop().call_later(max(0.0, min(ends) - now), self._look) if ends else None

    def close(self) -> None:
        """Wait for nobody any more. Idempotent."""
        if self._clock is not None:
            self._clock.cancel()

    def _look(self) -> None:
        now = time.monotonic()
        for session in self._away():
            if session.overdue or self._end(session) <= now:
                session.overdue = True
                self._give_up(session)
        self.wind()

    def _away(self) -> list[Session]:
        return [session for session in self._sessions.values() if session.detached]

    def _end(self, session: Session) -> float:
        return max(session.away_since + self._grace_s, self._began + LEAST * self._grace_s)
