"""One lease for each rank of an engine: all write or all read, and what they read is of one checkpoint.

Who may write is decided at one device, that of the first rank: whoever writes there is the only one that asks to write elsewhere. So two engines that
start at once never wait for each other. The first rank is the one whose device's name sorts first, so that engines which count the same devices
differently agree on it.

All ranks ask in turns of a second, and tell one another after each what they were answered: a refusal anywhere ends the wait everywhere, and names
the rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from gms_core.client import ReadLease, Session, WriteLease
from gms_core.engine_log import log
from gms_core.errors import AcquireTimeout, ConfigurationError, GenerationConflict, GmsError, IdentityMismatch, rebuild
from gms_core.protocol.messages import Mode
from gms_core.ranks import Ranks

TURN_S = 1.0
"""Seconds for which ranks ask between two meetings, while more than one of them waits."""
ALONE_S = 60.0
"""Seconds for which the only one that waits asks. Groups of ranks give up a meeting to which one does not come within many minutes."""

Lease = WriteLease | ReadLease


class Ask(Protocol):
    """Asks the server of this rank's device for a lease on the pool of this rank's weights."""

    def __call__(self, mode: Mode, timeout_s: float, *, replace: int | None = None) -> Lease:
        """As `gms_core.client.Session.acquire`."""


class _Answer(NamedTuple):  # every rank unpickles those of all, and a data class with slots takes ten times as long
    """What a rank tells the others of its turn.

    Attributes:
        given: ``rw``, ``ro``, ``none`` (it was not its turn to ask), ``waits``, ``empty`` (there is nothing to read, and nobody writes), ``changed``
            (another engine has published meanwhile) or ``failed``.
        generation: That it reads; 0 if none.
        size: Bytes of that.
        content: Digest of the checkpoint that it reads, empty if that is unknown.
        code: Of the error.
        sentence: Of the error.
    """

    given: str
    generation: int = 0
    size: int = 0
    content: str = ""
    code: str = ""
    sentence: str = ""


class _Empty(Exception):
    """There is nothing to read, and nobody writes."""


class GroupLease:
    """One engine's way to its leases. Each method is called by all ranks."""

    def __init__(self, session: Session, pool: str, ask: Ask, mode: Mode, timeout_s: float, group: Ranks) -> None:
        """Prepare.

        Args:
            session: With the server of this rank's device.
            pool: Of this rank's weights.
            ask: Asks for a lease on it.
            mode: The user's.
            timeout_s: Seconds to wait at most, in all.
            group: All ranks.
        """
        self._session, self._pool, self._ask, self._mode, self._group = session, pool, ask, mode, group
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._lease: Lease | None = None
        self._devices: list[str] = []
        self._first = False

    def acquire(self) -> Lease:
        """Get this rank's lease.

        Raises:
            ConfigurationError: The ranks, which may be on several machines, were given different modes.
            IdentityMismatch: What is published for one rank is of another checkpoint than what is published for another one.
            AcquireTimeout: Others wrote, or published again and again, for too long.
            GmsError: This rank's lease was not granted, or another rank's: the message names it.
        """
        modes, self._devices = map(list, zip(*self._group.all_gather_object((self._mode, str(self._session.device))), strict=True))
        _check_modes(modes)
        number = self._group.rank_in_group
        self._first = number == min(range(len(modes)), key=lambda rank: (self._devices[rank], rank))
        try:
            seen = self._round([])
            while self._lease is None:
                late = any(self._group.all_gather_object(time.monotonic() >= self._deadline))  # one answer for all: their clocks differ
                seen = self._round(seen)
                if late and self._lease is None:
                    raise AcquireTimeout(
                        f"no lease within {self._timeout_s:g} s: others have published again and again for some of the ranks of this engine",
                        hint="Find out which engines start again and again.",
                    )
        except BaseException:
            self._drop()
            raise
        return self._lease

    def _round(self, seen: list[_Answer]) -> list[_Answer]:
        """Ask once, all ranks. If there is no lease then, what was found did not fit together, and is to be looked at again."""
        if self._mode == "ro":
            return self._compared(self._meet(self._read), seen)
        answers = self._meet(self._decide if self._first else None)
        if any(answer.given == "rw" for answer in answers):
            if not self._first:
                self._meet(self._write if self._mode == "rw" else self._write_over)
            else:
                self._meet(None)
            return answers
        answers = self._meet(None if self._first else self._look)
        empty = [rank for rank, answer in enumerate(answers) if answer.given == "empty"]
        if not empty:
            return self._compared(answers, seen)
        log().warning("nothing is published for rank %s of this engine, so all of its ranks publish", ", ".join(map(str, empty)))
        self._drop()
        answers = self._meet(self._write_again(answers) if self._first else None)
        if any(answer.given == "changed" for answer in answers):
            self._drop()
            return []
        self._meet(None if self._first else self._write_over)
        return answers

    def _compared(self, answers: list[_Answer], seen: list[_Answer]) -> list[_Answer]:
        """Keep what is read if it is of one checkpoint. If not, another engine may be publishing: look again, and refuse what has not changed."""
        if len({answer.content for answer in answers if answer.content}) > 1:
            if answers == seen:
                raise IdentityMismatch(
                    f"what is published for the ranks of this engine is not of one checkpoint: {_listed([answer.content for answer in answers])}",
                    hint="Start an engine with mode rw once: it publishes anew for all ranks.",
                )
            self._drop()
            time.sleep(TURN_S)
        return answers

    def _meet(self, ask: Callable[[float], Lease] | None) -> list[_Answer]:
        """Take turns until every rank that asks was answered.

        Args:
            ask: Asks for this rank, for some seconds at most; None if it keeps what it has.

        Returns:
            What each rank has then.
        """
        turn_s = TURN_S
        while True:
            own, failure = self._turn(ask, turn_s)
            answers = list(self._group.all_gather_object(own))
            if failure is not None:
                raise failure
            for rank, answer in enumerate(answers):
                if answer.given == "failed":
                    what = f"rank {rank} of this engine ({self._devices[rank]}) was not granted a lease: {answer.sentence}"
                    raise rebuild(answer.code, what, "The log of that rank says more.", {})
            given = [answer.given for answer in answers]
            if "waits" not in given or "empty" in given or "changed" in given:
                return answers
            turn_s = TURN_S if given.count("waits") > 1 else ALONE_S

    def _turn(self, ask: Callable[[float], Lease] | None, seconds: float) -> tuple[_Answer, BaseException | None]:
        """Ask, if there is something to ask, and say what came of it."""
        if ask is None or self._lease is not None:
            return self._had(), None
        left_s = max(0.0, self._deadline - time.monotonic())
        try:
            self._lease = ask(min(seconds, left_s))
        except _Empty:
            return _Answer("empty"), None
        except GenerationConflict:
            return _Answer("changed"), None
        except AcquireTimeout as late:
            if left_s > seconds:
                return _Answer("waits"), None
            failure = AcquireTimeout(f"not granted within {self._timeout_s:g} s in all: {late.message}", hint=late.hint)
            return _failed(failure), failure
        except BaseException as error:  # noqa: BLE001 - it is raised once the others know
            return _failed(error), error
        return self._had(), None

    def _had(self) -> _Answer:
        match self._lease:
            case None:
                return _Answer("none")
            case ReadLease() as lease:
                layout = lease.layout
                return _Answer("ro", layout.generation, layout.size, layout.identity.fields.get("content", ""))
            case _:
                return _Answer("rw")

    def _read(self, seconds: float) -> Lease:
        return self._ask("ro", seconds)

    def _write(self, seconds: float) -> Lease:
        return self._ask("rw", seconds)

    def _decide(self, seconds: float) -> Lease:
        return self._ask(self._mode, seconds)

    def _look(self, seconds: float) -> Lease:
        """Read what is published, or find that there is nothing.

        The server says that by a right to write. It is given back at once, as somebody who writes at the first device may wait for it.
        """
        lease = self._ask("auto", seconds)
        if isinstance(lease, WriteLease):
            lease.release()
            raise _Empty
        return lease

    def _write_over(self, seconds: float) -> Lease:
        """Write where the first rank writes. What is published here must be what the user has asked for all the same."""
        try:
            with self._ask("ro", 0.0) as lease:
                assert isinstance(lease, ReadLease)
                there = lease.layout
            return self._ask("rw", 0.0, replace=there.generation if self._is_full(there.size) else None)
        except (AcquireTimeout, GenerationConflict):  # nothing is there, it is read, or somebody writes
            return self._ask("rw", seconds)

    def _write_again(self, answers: Sequence[_Answer]) -> Callable[[float], Lease]:
        """Write where the first rank has read a generation, unless another engine has published meanwhile."""
        there = answers[self._group.rank_in_group]

        def ask(seconds: float) -> Lease:
            if self._is_full(there.size):
                try:
                    return self._ask("rw", 0.0, replace=there.generation)
                except AcquireTimeout:  # it is read, or another engine writes
                    pass
            lease = self._ask("rw", seconds)
            if any(pool.name == self._pool and pool.generation == there.generation for pool in self._session.status().pools):
                return lease
            lease.release()
            raise GenerationConflict("another engine has published meanwhile")

        return ask

    def _is_full(self, size: int) -> bool:
        """Whether the device has no room for another generation as large as one that is there: nobody reads it, so the new one takes its place."""
        return self._session.status().memory_free < size

    def _drop(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()


def _failed(error: BaseException) -> _Answer:
    return _Answer("failed", code=error.code if isinstance(error, GmsError) else GmsError.code, sentence=str(error) or type(error).__name__)


def _check_modes(modes: Sequence[Mode]) -> None:
    if len(set(modes)) > 1:
        raise ConfigurationError(f"the ranks of this engine were given different modes: {_listed(modes)}", hint="Give all nodes the same block gms.")


def _listed(values: Sequence[object]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
