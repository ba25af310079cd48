"""Which requests change what has to outlive the server, and which promise nothing."""

from __future__ import annotations

from gms_core.protocol.messages import (
    Acquire,
    Allocate,
    AwaitRole,
    Beat,
    BeginMove,
    Commit,
    Drop,
    DropGeneration,
    Elect,
    Events,
    Export,
    Hold,
    Instruct,
    Join,
    Pin,
    Plan,
    Provide,
    Report,
    Request,
    Rollback,
    Status,
    Unpin,
    WillNotify,
)

GRANTING = (Acquire, Allocate, Commit, Join, Elect, Plan, Provide, Hold, Drop, BeginMove, Pin, Unpin, Rollback, DropGeneration)
"""Requests that change what has to outlive the server; they are refused when there is no room to write that down."""
IDLE = (Status, Events, Beat, Report, WillNotify, AwaitRole, Export, Instruct)
"""Requests whose answers promise nothing that the next server has to keep: a journal that cannot be written is no reason to leave them unanswered."""


def written_again(request: Request) -> tuple[str, ...]:
    """What a request that grants may write once more; see `gms_core.server.durable.Durable.size`."""
    pool = getattr(request, "pool", "")
    return ("retained", f"pool/{pool}")


def added_bytes(request: Request) -> int:
    """Bytes that a request adds to what is written, beside some small change."""
    return len(request.manifest) if isinstance(request, Commit) else len(request.plan) if isinstance(request, Provide) else 0
