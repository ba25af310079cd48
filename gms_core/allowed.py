"""Who may use a server besides its own user and root, and the users whose servers a client trusts.

The kernel's file modes come first: nobody connects who may not enter the directory and write to the socket. So whoever is allowed has to have one
group in common, and the directory and the socket are given to that group.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_core.errors import InvalidArgument

_OVERFLOW = Path("/proc/sys/kernel")
_HIGHEST = 2**32 - 2
"""The highest number of a user or a group; the one after it means none."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Users and a group that may use a server besides its own user and root.

    Attributes:
        users: Their numbers.
        group: Number of the group whose members all may; None if no group may.
        files: Number of the group that the directory and the socket are given to; None if nobody else may use the server.
    """

    users: frozenset[int] = frozenset()
    group: int | None = None
    files: int | None = None

    def admits(self, uid: int, groups: Collection[int], own_uid: int) -> bool:
        """Whether a peer may use the server.

        Args:
            uid: Of the peer.
            groups: All groups of the peer.
            own_uid: Of the server.
        """
        return uid in (own_uid, 0) or uid in self.users or (self.group is not None and self.group in groups)

    @property
    def words(self) -> list[str]:
        """In the form that `allowed` reads, with numbers alone."""
        return [str(uid) for uid in sorted(self.users)] + ([f":{self.group}"] if self.group is not None else [])


def allowed(words: Sequence[str]) -> Allowed:
    """Understand who is to be allowed.

    Args:
        words: ``USER`` or ``:GROUP`` each, by name or number.

    Raises:
        InvalidArgument: There is no such user or group, or those that are named have no group in common to which the socket could be given.
    """
    users = frozenset(user_number(word) for word in words if not word.startswith(":"))
    groups = {_group_number(word[1:]) for word in words if word.startswith(":")}
    if len(groups) > 1:
        raise InvalidArgument("only one group can be allowed: a socket has one", hint="Make a group of all users that are to be allowed.")
    if groups:
        (group,) = groups
        return Allowed(users, group, group)
    return Allowed(users, None, _group_in_common(users) if users else None)


def _group_in_common(users: Iterable[int]) -> int:
    first = {uid: _first_group(uid) for uid in users}
    hint = "Allow one group that all of them are in: --allow :GROUP."
    if unknown := [uid for uid, group in first.items() if group is None]:
        raise InvalidArgument(f"the group of user {unknown[0]} is not known here, so the socket cannot be given to it", hint=hint)
    found = {group for group in first.values() if group is not None}
    if len(found) > 1:
        raise InvalidArgument(f"the users {sorted(first)} have different groups, and a socket has one", hint=hint)
    return found.pop()


def _first_group(uid: int) -> int | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_gid
    return None


def user_number(word: str) -> int:
    """The number of a user, by name or number.

    Raises:
        InvalidArgument: There is no such user, or the number stands for all users that this namespace cannot name.
    """
    if word.isascii() and word.isdecimal():
        return _checked(word, "user", "overflowuid")
    try:
        return _checked(str(pwd.getpwnam(word).pw_uid), "user", "overflowuid")
    except (KeyError, ValueError):
        raise InvalidArgument(f"there is no user {word!r} here", hint="Name a user, or a user's number.") from None


def _group_number(word: str) -> int:
    if word.isascii() and word.isdecimal():
        return _checked(word, "group", "overflowgid")
    try:
        return _checked(str(grp.getgrnam(word).gr_gid), "group", "overflowgid")
    except (KeyError, ValueError):
        raise InvalidArgument(f"there is no group {word!r} here", hint="Name a group, or a group's number, after the colon.") from None


def _checked(digits: str, what: str, overflow: str) -> int:
    number = int(digits)
    if number > _HIGHEST:
        raise InvalidArgument(f"{number} cannot be the number of a {what}")
    with contextlib.suppress(OSError, ValueError):
        if number == int((_OVERFLOW / overflow).read_text()):
            raise InvalidArgument(f"{what} {number} cannot be trusted: the kernel calls everybody so who has no number in this user namespace")
    return number


def trusted_servers(server_user: int | None) -> frozenset[int]:
    """Users whose servers this process connects to: itself, root, and the one that it was told."""
    return frozenset({os.getuid(), 0} | ({server_user} if server_user is not None else set()))
