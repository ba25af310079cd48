"""A client's connection, as far as the pools are concerned, and how a request of it waits for an answer."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gms_core.errors import InvalidArgument
from gms_core.protocol.messages import Message, Waiting
from gms_core.protocol.peer import PeerCredentials, open_process
from gms_core.server.effects import Refuse, SessionId, Wait
from gms_core.server.records import SessionRecord

if TYPE_CHECKING:
    from gms_core.server.memory import Memory, Owned

Send = Callable[[Message, tuple[int, ...]], Awaitable[None]]
"""Sends a message with descriptors to the client."""
NAME = 256
"""Characters of a client's name that events have."""


@dataclass
class Session:
    """One client.

    Attributes:
        open_pidfd: Gives a new descriptor of the client's process.
        answers: What the machines have decided about this session's waiting request; a `Wait` is news, anything else ends the request.
        ended: Set once the client has gone.
        waiting_for: What it waits for, in words; empty when it does not.
        token: With which its client can resume it at the next server; empty if it cannot.
        started: When the client's process was started, in ticks of the kernel; 0 if that is not known.
        detached: Whether it was taken over from the server before, and its client has not come back yet.
        away_since: When the first server began to wait for its client, on the monotonic clock; 0 if that is there.
        overdue: Whether its client has had all the time that there is to come back.
        repeats: Whether the client's next request may have been carried out already.
        promises: Whether the answer to the request that is being carried out rests on what the next server has to know.
    """

    id: SessionId
    peer: PeerCredentials
    client: str
    send: Send
    open_pidfd: Callable[[], int]
    since: float = field(default_factory=time.monotonic)
    answers: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    waiting_for: str = ""
    token: str = ""
    started: int = 0
    detached: bool = False
    away_since: float = 0.0
    overdue: bool = False
    repeats: bool = False
    promises: bool = True

    def is_resumed_by(self, token: str, peer: PeerCredentials) -> bool:
        """Whether a process that says this token is the client of this session, which waits for it."""
        same = (self.peer.pid, self.peer.uid) == (peer.pid, peer.uid)
        return self.detached and same and hmac.compare_digest(self.token.encode(), token.encode())

    def is_of(self, other: Session) -> bool:
        """Whether both are of the same process."""
        return bool(self.started) and (self.peer.pid, self.started) == (other.peer.pid, other.started)

    @property
    def who(self) -> dict[str, str | int]:
        """Its process, and what that calls itself, for events."""
        return {"pid": self.peer.pid, "client": self.client[:NAME]}

    def record(self, leases: dict[str, int], uses: tuple[str, ...], moves: dict[str, int]) -> SessionRecord:
        """What the next server has to know.

        Args:
            leases: Generation that it reads, by pool.
            uses: Retained pools whose plan it has.
            moves: Generation that it is about to read instead, by pool.
        """
        peer = self.peer
        return SessionRecord(self.token, peer.pid, peer.uid, peer.gid, self.client, self.since, self.started, leases, uses, moves, self.away_since)

    async def answer(self, about: str, timeout_s: float, ended: asyncio.Event, withdraw: Callable[[], None]) -> Any:
        """Wait for the decision about this session's request, and tell the client what it waits for.

        Args:
            about: What the request is about, for status.
            timeout_s: Seconds to wait at most.
            ended: Set once the client has gone.
            withdraw: Takes the request back when its time is over; the machine answers that with a refusal, unless it has answered already.

        Raises:
            GmsError: The request is refused.
            ConnectionError: The client has gone.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while isinstance(answer := await self._next(deadline, ended), Wait):
                self.waiting_for = f"{about}: {answer.reason}"
                await self.send(Waiting(answer.reason), ())
            if answer is None:
                withdraw()
                while isinstance(answer := await self.answers.get(), Wait):
                    pass  # news that came as the time ended
        finally:
            self.waiting_for = ""
        if isinstance(answer, Refuse):
            raise answer.error
        return answer

    async def memory(self, memory: Memory, sizes: Sequence[int], timeout_s: float, ended: asyncio.Event, pool: str) -> list[tuple[int, Owned]]:
        """Have memory made, and show what it waits for; see `Memory.create`."""

        def waits(reason: str) -> None:
            self.waiting_for = f"memory: {reason}"

        try:
            return await memory.create(sizes, timeout_s, ended, pool, waits)
        finally:
            self.waiting_for = ""

    async def _next(self, deadline: float, ended: asyncio.Event) -> Any:
        """The next decision about the session's request; None when its time is over."""
        if not self.answers.empty():
            return self.answers.get_nowait()  # decided at once, as most are: no task is needed
        answer = asyncio.ensure_future(self.answers.get())
        gone = asyncio.ensure_future(ended.wait())
        try:
            await asyncio.wait((answer, gone), timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise ConnectionResetError("the client has gone while it waited")
            return None
        finally:
            answer.cancel()
            gone.cancel()


def detached(number: SessionId, record: SessionRecord) -> Session:
    """A session of the server before, whose client has not come back yet."""
    now = time.monotonic()

    async def send(_: Message, __: tuple[int, ...]) -> None:
        raise ConnectionResetError("the client has not come back yet")

    peer = PeerCredentials(record.pid, record.uid, record.gid)
    return Session(
        number,
        peer,
        record.client,
        send,
        lambda: open_process(record.pid, record.started),
        since=record.since,
        token=record.token,
        started=record.started,
        detached=True,
        away_since=min(now, record.away_since) or now,
    )


def check_wait(timeout_s: float, limit_s: float) -> None:
    """Raise `InvalidArgument` unless a request may ask to wait for so long."""
    if not 0 <= timeout_s <= limit_s:
        raise InvalidArgument(f"a wait of {timeout_s} s is not between 0 and {limit_s:g}")
