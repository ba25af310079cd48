"""What a user or a pool may have of a device, as rules, and whether a request would go beyond one. Pure.

A rule is written ``user=1000,bytes=40GiB,sessions=64``: whom it is about, and its limits. One line each, so that the command line of a running
server shows all that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import msgspec

from gms_core.allowed import user_number
from gms_core.errors import InvalidArgument, QuotaExceeded

Scope = Literal["user", "pool"]
Resource = Literal["bytes", "allocations", "metadata", "sessions"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)
EACH = "*"
"""Each user or pool that has no rule of its own for the same thing."""
_SIZES = ("bytes", "metadata")
_FORM = "Write it as user=1000,bytes=40GiB or pool=weights,allocations=4096; user=* and pool=* are for each that has no limit of its own."


class Quota(msgspec.Struct, frozen=True):
    """One limit.

    Attributes:
        scope: Whether it is about a user or a pool.
        who: The user's number, the pool's name, or `EACH`.
        resource: What is limited: bytes of memory, allocations, bytes of manifests, identities and plans, or sessions.
        limit: How much of it there may be.
    """

    scope: Scope
    who: str
    resource: Resource
    limit: int


class Holding(NamedTuple):
    """What a user has in a pool."""

    uid: int
    pool: str
    bytes: int = 0
    allocations: int = 0
    metadata: int = 0

    def of(self, resource: Resource) -> int:
        """How much of a resource it is; sessions are counted elsewhere."""
        return 0 if resource == "sessions" else int(getattr(self, resource))


def parse_quotas(words: Sequence[str], size: Callable[[str], int]) -> tuple[Quota, ...]:
    """Understand quotas as people write them.

    Args:
        words: One for each user or pool.
        size: Bytes of a size such as ``40GiB``; raises `ValueError` for what is none.

    Raises:
        InvalidArgument: One is not understood, or limits the same thing as another one.
    """
    found: list[Quota] = []
    for word in words:
        pairs = [tuple(part.strip() for part in piece.partition("=")[::2]) for piece in word.split(",")]
        scope, who = pairs[0]
        if scope not in get_args(Scope) or not who or len(pairs) < 2:
            raise InvalidArgument(f"{word!r} is no quota", hint=_FORM)
        if scope == "user" and who != EACH:
            who = str(user_number(who))
        for name, value in pairs[1:]:
            if name not in RESOURCES:
                raise InvalidArgument(f"{word!r} limits {name!r}, which is none of {', '.join(RESOURCES)}", hint=_FORM)
            found.append(Quota(scope, who, name, _number(word, value, size if name in _SIZES else None)))  # type: ignore[arg-type]
    names = [(one.scope, one.who, one.resource) for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidArgument(f"there are two quotas for the {twice[0][2]} of {twice[0][0]} {twice[0][1]}")
    return tuple(found)


def _number(word: str, value: str, size: Callable[[str], int] | None) -> int:
    if value.isascii() and value.isdecimal():
        return int(value)
    try:
        if size is not None:
            return size(value)
    except ValueError as error:
        raise InvalidArgument(f"{word!r} is no quota: {error}", hint=_FORM) from None
    raise InvalidArgument(f"{word!r} is no quota: {value!r} is no number", hint=_FORM)


def encode_quotas(quotas: Sequence[Quota]) -> str:
    """The form in which a device server is told of quotas."""
    return msgspec.json.encode(quotas).decode()


def decode_quotas(text: str) -> tuple[Quota, ...]:
    """What `encode_quotas` has written."""
    return msgspec.json.decode(text, type=tuple[Quota, ...])


def effective(quotas: Iterable[Quota], scope: Scope, who: str) -> Iterator[Quota]:
    """The quotas that hold for a user or a pool: its own ones, and those for each in what it has none of its own for."""
    chosen: dict[Resource, Quota] = {}
    for quota in quotas:
        if quota.scope == scope and quota.who in (who, EACH) and (quota.resource not in chosen or quota.who != EACH):
            chosen[quota.resource] = quota
    yield from chosen.values()


def used(quota: Quota, who: str, holdings: Iterable[Holding]) -> int:
    """How much of what a quota limits a user or a pool has."""
    return sum(one.of(quota.resource) for one in holdings if who == (str(one.uid) if quota.scope == "user" else one.pool))


def check(quotas: Sequence[Quota], wanted: Holding, holdings: Sequence[Holding]) -> None:
    """Refuse what would go beyond a quota.

    Args:
        quotas: All.
        wanted: What a user asks for in a pool; of what it asks nothing of, it may have more than its quota says.
        holdings: What everybody has.

    Raises:
        QuotaExceeded: It would.
    """
    subjects: Mapping[Scope, str] = {"user": str(wanted.uid), "pool": wanted.pool}
    for scope, who in subjects.items():
        for quota in effective(quotas, scope, who):
            if asked := wanted.of(quota.resource):
                check_one(quota, who, used(quota, who, holdings), asked)


def check_one(quota: Quota, who: str, now: int, asked: int) -> None:
    """Refuse what would go beyond one quota.

    Raises:
        QuotaExceeded: It would; it names the quota, its use and its limit.
    """
    if now + asked <= quota.limit:
        return
    what = {"bytes": "bytes of memory", "metadata": "bytes of metadata"}.get(quota.resource, quota.resource)
    name = f"{quota.scope}={who}"
    raise QuotaExceeded(
        f"{quota.scope} {who} has {now} {what} of {quota.limit} that its quota allows, and asks for {asked} more",
        hint=f"Release some, or start the server with a larger --quota {name},{quota.resource}=...",
        details={"quota": f"{name},{quota.resource}", "used": str(now), "limit": str(quota.limit), "wanted": str(asked)},
    )
