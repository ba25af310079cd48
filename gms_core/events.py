"""What can happen at a device server, and in which words: the one list that its log, its event log and ``gms events`` share."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from typing import Self

Facts = Mapping[str, str | int | float | bool]
"""What there is to know of an event, by name."""


class Kind(enum.StrEnum):
    """A kind of event; the same table is in docs/reference/events.md. What comes before the first underscore says what the subject is.

    Attributes:
        words: The sentence, with the names of the facts that stand in it.
        level: Of the line in the log.
        frequent: Whether there are as many of it as there are clients: those have a place of their own, so that they displace no others.
    """

    words: str
    level: int
    frequent: bool

    def __new__(cls, value: str, words: str, level: int = logging.INFO, frequent: bool = False) -> Self:
        """Make a member of its name and the rest."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.words, member.level, member.frequent = words, level, frequent
        return member

    SERVER_STARTED = "server_started", "gms {version}, pid {pid}, begins with nothing"
    SERVER_ADOPTED = (
        "server_adopted",
        "gms {version}, pid {pid}, goes on with {allocations} allocations, {sessions} sessions and {engines} engines of the server before",
    )
    SERVER_BEGAN_ANEW = "server_began_anew", "gms {version}, pid {pid}, begins anew: what the server before had is lost", logging.WARNING
    SERVER_HANDED_OVER = "server_handed_over", "pid {pid} takes over"
    POOL_DRAFT_BEGUN = "pool_draft_begun", "session {session} (pid {pid}) writes generation {generation}"
    POOL_DRAFT_DROPPED = "pool_draft_dropped", "the draft of generation {generation} was given up by session {session}, and is dropped"
    POOL_COMMITTED = "pool_committed", "session {session} (pid {pid}) committed generation {generation}, {bytes} bytes in {allocations} allocations"
    POOL_ROLLED_BACK = "pool_rolled_back", "session {session} (pid {pid}) brought generation {to} back, as generation {generation}, {bytes} bytes"
    POOL_DRAFT_RENUMBERED = "pool_draft_renumbered", "what session {session} (pid {pid}) writes is generation {generation} now: {before} is taken"
    POOL_PINNED = "pool_pinned", "session {session} (pid {pid}) pinned generation {generation}"
    POOL_UNPINNED = "pool_unpinned", "session {session} (pid {pid}) unpinned generation {generation}"
    POOL_GENERATION_DROPPED = "pool_generation_dropped", "session {session} (pid {pid}) dropped generation {generation}"
    POOL_GENERATION_FREED = "pool_generation_freed", "generation {generation}, {bytes} bytes, is freed"
    POOL_LEASE_GRANTED = "pool_lease_granted", "session {session} (pid {pid}) reads generation {generation}", logging.INFO, True
    POOL_LEASE_RELEASED = "pool_lease_released", "session {session} gave up its read lease", logging.INFO, True
    POOL_LEASE_MOVED = "pool_lease_moved", "session {session} (pid {pid}) reads generation {generation} in place of {before}", logging.INFO, True
    POOL_PLANNING = "pool_planning", "{engine} plans it"
    POOL_PLANNED = "pool_planned", "{engine} has planned {bytes} bytes in {allocations} allocations"
    POOL_DROPPED = "pool_dropped", "its {bytes} bytes are freed, and its plan is forgotten"
    POOL_EPOCH_GRANTED = "pool_epoch_granted", "{engine} holds {part} of it, epoch {epoch}"
    POOL_WHOLE = "pool_whole", "{engine} may have the rest of it, epoch {epoch}: the holder before is proven to be gone"
    POOL_MEMORY_WAIT_BEGUN = "pool_memory_wait_begun", "{bytes} bytes for it have to wait for memory"
    POOL_MEMORY_WAIT_ENDED = "pool_memory_wait_ended", "the wait for {bytes} bytes is over after {seconds:.1f} s: {outcome}"
    ENGINE_JOINED = "engine_joined", "{process} (pid {pid}) has joined cohort {cohort}"
    ENGINE_ROLE_CHANGED = "engine_role_changed", "{before} -> {role}, cohort {cohort}"
    ENGINE_ORDERED = "engine_ordered", "an operator orders: {order}, cohort {cohort}"
    ENGINE_DEPARTING = "engine_departing", "it is ending in an orderly way, cohort {cohort}"
    ENGINE_FENCED = "engine_fenced", "cohort {cohort} is ended: {reason}", logging.WARNING
    ENGINE_FENCE_FAILED = "engine_fence_failed", "cohort {cohort}: {reason}", logging.ERROR
    ENGINE_PROCESS_EXITED = "engine_process_exited", "{process} (pid {pid}) of cohort {cohort} has exited"
    ENGINE_GONE = "engine_gone", "every process of cohort {cohort} has exited, {seconds:.3f} s after its end began"
    LOCK_GRANTED = "lock_granted", "{engine} has it, term {term}, cohort {cohort}"
    SESSION_RESUMED = "session_resumed", "pid {pid} ({client}) has come back", logging.INFO, True
    SESSION_LOST = "session_lost", "pid {pid} ({client}) has not come back within {seconds:g} s"
    EVENTS_LOST = "events_lost", "{count} events were displaced before they were read", logging.WARNING

    @property
    def about(self) -> str:
        """What its subject is."""
        return self.value.partition("_")[0]


_KINDS = {str(kind): kind for kind in Kind}


def sentence(kind: str, facts: Facts) -> str:
    """An event in words, without its subject. A kind of another version of gms, or one with other facts, is told as the facts alone."""
    known = _KINDS.get(kind)
    if known is not None:
        try:
            return known.words.format_map(facts)
        except (KeyError, ValueError):
            pass
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def text(kind: str, subject: str, facts: Facts) -> str:
    """An event in words, as the log has it."""
    return f"{kind.partition('_')[0]} {subject}: {sentence(kind, facts)}"
