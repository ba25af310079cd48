"""What a user may do to what another user has, where several may use one server.

Whoever is allowed to use a server may read what is published, and may publish, plan and elect beside the others, under names of its own. It may not
write over another user's weights, see another user's KV memory, join, instruct or stand in for another user's engines, or end the server. Root and
the server's own user, who could do all of that without asking, may.
"""

from __future__ import annotations

from collections.abc import Mapping

from gms_core.errors import PermissionRefused
from gms_core.protocol.messages import Acquire, Commit, Drop, Elect, HandOver, Instruct, Join, Plan, Request
from gms_core.server.accounts import Accounts, Owner
from gms_core.server.cohorts import Cohort
from gms_core.server.effects import SessionId
from gms_core.server.seat import Seat


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
    owner, what = None, ""
    match request:
        case HandOver():
            raise PermissionRefused(f"user {uid} may not take this server over: it is user {accounts.own_uid}'s")
        case Acquire(mode="rw") | Commit():
            published = accounts.published.get(request.pool)
            owner, what = accounts.writer_of(published) if published is not None else None, f"pool {request.pool!r} may be written"
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
        raise PermissionRefused(f"{what} by user {owner} alone, or by the server's own; this is user {uid}", hint="Use another name.")


def _user_of_cohort(cohort: Cohort | None, sessions: Mapping[SessionId, Owner]) -> int | None:
    if cohort is None:
        return None
    return next((sessions[number].peer.uid for number in cohort.members if number in sessions), None)
