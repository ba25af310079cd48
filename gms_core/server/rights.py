"""What a user may do to what another user has, where several may use one server.

Whoever is allowed to use a server may read what is published, and may publish, plan and elect beside the others, under names of its own. It may not
write over another user's weights, keep, free or bring back generations of theirs, see another user's KV memory, join, instruct or stand in for
another user's engines, or end the server. Root and the server's own user, who could do all of that without asking, may.
"""

from __future__ import annotations

from collections.abc import Mapping

from gms_core.errors import PermissionRefused
from gms_core.protocol.messages import (
    Acquire,
    Commit,
    Drop,
    DropGeneration,
    Elect,
    HandOver,
    Instruct,
    Join,
    Pin,
    Plan,
    Request,
    Rollback,
    Unpin,
)
from gms_core.server.accounts import Accounts, Owner
from gms_core.server.cohorts import Cohort
from gms_core.server.effects import SessionId
from gms_core.server.published import PublishedPool
from gms_core.server.seat import Seat

_WRITTEN = "pool {!r} may be written"


def check_rights(
    session: Owner,
    request: Request,
    accounts: Accounts,
    sessions: Mapping[SessionId, Owner],
    cohorts: Mapping[str, Cohort],
    locks: Mapping[str, Seat],
) -> None:
    """Refuse a request that its user has no right to.

    Args:
        session: Who asks.
        request: For what.
        accounts: Who has made what.
        sessions: All that are open.
        cohorts: All cohorts by name.
        locks: All locks by name.

    Raises:
        PermissionRefused: It has not.
    """
    uid = session.peer.uid
    if uid in (accounts.own_uid, 0):
        return
    owner, what, hint = None, "", "Use another name."
    match request:
        case HandOver():
            raise PermissionRefused(f"user {uid} may not take this server over: it is user {accounts.own_uid}'s")
        case Acquire(mode="rw"):
            published = accounts.published.get(request.pool)
            owner, what = accounts.writer_of(published) if published is not None else None, _WRITTEN.format(request.pool)
        case Commit():
            published = accounts.published.get(request.pool)
            if published is not None and published.lease_of(session.id) == "write":
                owner, what = accounts.last_maker_of(published), _WRITTEN.format(request.pool)
        case Rollback():
            published = accounts.published.get(request.pool)
            owners = (accounts.writer_of(published), accounts.maker_of(published, request.to)) if published is not None else ()
            owner, hint = next((one for one in owners if one not in (None, uid)), None), ""
            what = f"generation {request.to} of pool {request.pool!r} may be brought back"
        case Pin() | Unpin() | DropGeneration():
            published = accounts.published.get(request.pool)
            owner = accounts.maker_of(published, request.generation) if published is not None else None
            what, hint = f"generation {request.generation} of pool {request.pool!r} may be kept or freed", ""
        case Plan() | Drop():
            retained = accounts.retained.get(request.pool)
            owner, what = accounts.planner_of(retained) if retained is not None else None, f"pool {request.pool!r} may be used"
        case Join() | Instruct():
            cohort = cohorts.get(request.cohort)
            owner, what = _user_of_cohort(cohort, sessions), f"the engine {cohort.engine if cohort else ''!r} may be joined or instructed"
        case Elect():
            seat = locks.get(request.lock)
            claims = [claim for claim in (seat.holder, *seat.queue) if claim is not None] if seat is not None else []
            users = {sessions[claim.session].peer.uid for claim in claims if claim.session in sessions} - {uid}
            owner, what = min(users, default=None), f"lock {request.lock!r} may be had"
    if owner is not None and owner != uid:
        raise _refusal(what, owner, uid, hint)


def writing_forbidden(session: Owner, pool: PublishedPool, accounts: Accounts) -> PermissionRefused | None:
    """Why a session may not begin to write now; None if it may. `auto` asks for no more than it may have, and who waits may have lost the right."""
    uid, owner = session.peer.uid, accounts.last_maker_of(pool)
    if owner in (None, uid) or uid in (accounts.own_uid, 0):
        return None
    return _refusal(_WRITTEN.format(pool.name), owner, uid, "Use another name.")


def _refusal(what: str, owner: int | None, uid: int, hint: str) -> PermissionRefused:
    return PermissionRefused(f"{what} by user {owner} alone, or by the server's own; this is user {uid}", hint=hint)


def _user_of_cohort(cohort: Cohort | None, sessions: Mapping[SessionId, Owner]) -> int | None:
    if cohort is None:
        return None
    return next((sessions[number].peer.uid for number in cohort.members if number in sessions), None)
