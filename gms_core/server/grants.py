"""What a published pool is asked for, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gms_core.errors import GmsError
from gms_core.layout import Identity, Layout
from gms_core.protocol.messages import Mode
from gms_core.server.effects import Free, Refuse, SessionId, Wait


@dataclass(frozen=True)
class GrantWrite:
    """The session is the writer of this generation to be."""

    session: SessionId
    generation: int


@dataclass(frozen=True)
class GrantRead:
    """The session reads this layout."""

    session: SessionId
    layout: Layout


@dataclass(frozen=True)
class News:
    """The session has asked for a later generation: here it is."""

    session: SessionId
    layout: Layout


Effect = GrantWrite | GrantRead | News | Wait | Refuse | Free


@dataclass(frozen=True)
class Waiter:
    """A request that is not answered yet.

    Attributes:
        forbidden: Says why the session may not write now, if it may not.
    """

    session: SessionId
    mode: Mode
    identity: Identity
    replace: int | None
    renumbers: bool = False
    forbidden: Callable[[], GmsError | None] = lambda: None
    reason: str = ""
