"""What an engine is to its clients, as a pure machine: init, standby, promoting, primary, fenced.

An engine becomes the primary at most once, and what is fenced stays fenced: an engine that was demoted, or that failed, ends, and a new instance
takes its place. The loss of the server is the one event that means something else for a primary than for all others: it has its memory and goes on
serving; whoever is not yet the primary could never prove that it may become it, and ends.
"""

from __future__ import annotations

import enum
from typing import get_args

from gms_core.errors import RoleConflict
from gms_core.protocol.messages import Role

ROLES: tuple[Role, ...] = get_args(Role)


class Event(enum.StrEnum):
    """What happens to an engine."""

    READY = "is ready"
    ELECTED = "is elected"
    PROMOTED = "has its memory"
    SERVER_LOST = "has lost its server"
    ENDED = "is at its end"


_NEXT: dict[tuple[Role, Event], Role] = {
    ("init", Event.READY): "standby",
    ("standby", Event.ELECTED): "promoting",
    ("promoting", Event.PROMOTED): "primary",
    ("primary", Event.SERVER_LOST): "primary",
    **{(role, Event.SERVER_LOST): "fenced" for role in ROLES if role != "primary"},
    **{(role, Event.ENDED): "fenced" for role in ROLES},
}


def next_role(role: Role, event: Event) -> Role:
    """The role after an event.

    Raises:
        RoleConflict: The event cannot happen to an engine of this role.
    """
    try:
        return _NEXT[role, event]
    except KeyError:
        raise RoleConflict(f"an engine that {event} cannot have been {role}") from None
