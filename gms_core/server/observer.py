"""Tells of changes of state, once: to the log and to the event log; and counts what a server does."""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections import Counter
from types import TracebackType
from typing import Protocol, get_args

from gms_core.errors import GmsError, InvalidArgument
from gms_core.events import Kind, text
from gms_core.protocol.messages import EventBatch, Events, Request
from gms_core.protocol.observation import Durations, Event, Observation, RequestCount
from gms_core.server.event_log import EventLog
from gms_core.server.sessions import Session, check_wait

log = logging.getLogger(__name__)

BATCH = 512
"""Events of one answer."""
GATHER_S = 0.02
"""Seconds between an event and the answer to who waits for it: a burst is one answer, and costs those who caused it nothing."""
FENCE_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
REQUESTS: dict[type, str] = {kind: str(kind.__struct_config__.tag) for kind in get_args(Request)}
"""Names of requests as they stand in messages."""


class Tell(Protocol):
    """Something that is told of a change of state."""

    def __call__(self, kind: Kind, subject: str, /, **facts: str | float | bool) -> None:
        """Note it."""


def tell_nobody(_: Kind, __: str, /, **___: str | float | bool) -> None:
    """For parts of a server that nobody observes."""


class _Words:
    """An event's text, made only if somebody reads it."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __str__(self) -> str:
        return text(self._event.kind, self._event.subject, self._event.facts)


class _Counting:
    __slots__ = ("_counts", "_request")

    def __init__(self, counts: Counter[tuple[str, str]], request: str) -> None:
        self._counts, self._request = counts, request

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        outcome = "ok" if error is None else error.code if isinstance(error, GmsError) else "gone" if isinstance(error, OSError) else "failed"
        self._counts[self._request, outcome] += 1


class Observer:
    """What one device server has to tell.

    Attributes:
        log: Its events.
        restarts: See `gms_core.protocol.observation.Observation`; whoever knows of them sets it.
    """

    def __init__(self) -> None:
        self.log = EventLog()
        self.restarts: dict[str, int] = {}
        self._requests: Counter[tuple[str, str]] = Counter()
        self._fences = [0] * (len(FENCE_BOUNDS_S) + 1)
        self._fences_s = 0.0
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self, kind: Kind, subject: str, /, **facts: str | float | bool) -> None:
        """Note a change of state. The one way for it into the log and into the event log, so that the two agree."""
        event = self.log.add(kind, subject, facts)
        if log.isEnabledFor(kind.level):
            # By hand: where the call stands is the same for all of them, and to look for it costs more than all the rest.
            log.handle(log.makeRecord(log.name, kind.level, __file__, 0, "%s", (_Words(event),), None, "tell", {"gms_event": event}))
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def counting(self, request: object) -> _Counting:
        """A context in which a request is carried out: it is counted, by how it ends."""
        return _Counting(self._requests, REQUESTS[type(request)])

    def fenced(self, seconds: float) -> None:
        """Note how long it took to end an engine."""
        self._fences[bisect.bisect_left(FENCE_BOUNDS_S, seconds)] += 1
        self._fences_s += seconds

    def observation(self, sessions: int) -> Observation:
        """All of it as it is now.

        Args:
            sessions: How many are open.
        """
        return Observation(
            self.log.name,
            self.log.last,
            sessions,
            {kind.value: count for kind, count in self.log.counts.items()},
            tuple(RequestCount(*key, count) for key, count in sorted(self._requests.items())),
            Durations(FENCE_BOUNDS_S, tuple(self._fences), self._fences_s),
            dict(self.restarts),
        )

    async def events(self, session: Session, request: Events, ended: asyncio.Event, wait_s: float) -> None:
        """Send the events after one, waiting for the next if there is none.

        Args:
            session: Who asks.
            request: What.
            ended: Set once the client has gone.
            wait_s: Seconds that it may ask to wait.

        Raises:
            InvalidArgument: The number is negative, or the wait too long.
            ConnectionError: The client has gone while it waited.
        """
        check_wait(request.timeout_s, wait_s)
        if request.after < 0:
            raise InvalidArgument(f"no event has the number {request.after}")
        after = request.after if request.log == self.log.name else 0
        if after >= self.log.last and request.timeout_s:
            await self._next(request.timeout_s, ended)
        events, last, lost = self.log.after(after, BATCH)
        await session.send(EventBatch(self.log.name, tuple(events), last, lost), ())

    async def _next(self, timeout_s: float, ended: asyncio.Event) -> None:
        news = asyncio.get_running_loop().create_future()
        gone = asyncio.ensure_future(ended.wait())
        self._waiting.add(news)
        try:
            await asyncio.wait((news, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ConnectionResetError("the client has gone while it waited")
        finally:
            self._waiting.discard(news)
            gone.cancel()
        if news.done():
            await asyncio.sleep(GATHER_S)
