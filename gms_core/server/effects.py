"""What the pure machines of the server answer with, whatever they are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from gms_core.errors import GmsError

SessionId = NewType("SessionId", int)


@dataclass(frozen=True)
class Wait:
    """The session waits, and for this reason now."""

    session: SessionId
    reason: str


@dataclass(frozen=True)
class Refuse:
    """The session's request is refused, and it waits no more."""

    session: SessionId
    error: GmsError


@dataclass(frozen=True)
class Free:
    """Nothing refers to these allocations any more."""

    ids: tuple[int, ...]
