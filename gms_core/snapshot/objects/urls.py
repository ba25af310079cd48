"""URLs of roots in object stores, such as ``s3://bucket/prefix``. Pure: nothing is opened here.

No message of this module repeats a URL before it was found to be without credentials.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gms_core.errors import InvalidArgument

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "file")
"""What a root's URL can begin with."""
SMALLEST_PART = 5 * 2**20
"""Bytes of a part of an upload, at least, but for the last one: Amazon S3's rule, which others have too."""
MOST_PARTS = 10_000
"""Of one upload, likewise."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_AUTHORITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTAINER_AT_ACCOUNT = re.compile(r"[A-Za-z0-9-]+@[A-Za-z0-9.-]+")
_SEGMENT = re.compile(r"[A-Za-z0-9._~=+,@-]+")


class Location(NamedTuple):
    """A URL in two parts.

    Attributes:
        base: The bucket or container: ``s3://bucket``; of files ``file://``.
        key: What follows, without slashes at its ends; empty for the bucket itself.
    """

    base: str
    key: str


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return _SCHEME.fullmatch(text) is not None


def root_url(text: str) -> str:
    """A root's URL as it is written everywhere: its scheme in small letters, and without a slash at its end.

    Raises:
        InvalidArgument: It has credentials, options or odd characters, or is of a store that is not known.
    """
    found = _SCHEME.fullmatch(text)
    if found is None:
        raise InvalidArgument("a root in an object store is a URL, such as s3://bucket/prefix")
    scheme, rest = found[1].lower(), found[2]
    if scheme not in SCHEMES:
        raise InvalidArgument(f"a root's URL cannot begin with {scheme[:20]}://", hint=f"It can with {', '.join(f'{one}://' for one in SCHEMES)}.")
    authority, _, prefix = rest.partition("/")
    allowed = _CONTAINER_AT_ACCOUNT if scheme in ("abfs", "abfss") else _AUTHORITY
    if "?" in rest or "#" in rest or (":" in authority and "@" in authority) or ("@" in authority and allowed is _AUTHORITY):
        raise InvalidArgument(
            f"the root's URL {scheme}://… has more than a bucket and a prefix",
            hint="Credentials and options do not belong there: the store's own environment variables have them, such as AWS_ACCESS_KEY_ID.",
        )
    if scheme == "file" and (authority or not prefix):
        raise InvalidArgument("a URL of files names an absolute path: file:///directory")
    if scheme != "file" and allowed.fullmatch(authority) is None:
        shape = "CONTAINER@ACCOUNT.dfs.core.windows.net" if allowed is _CONTAINER_AT_ACCOUNT else "BUCKET"
        raise InvalidArgument(f"the root's URL names no bucket: write {scheme}://{shape}/PREFIX")
    prefix = prefix.rstrip("/")
    if prefix and any(_SEGMENT.fullmatch(segment) is None or segment in (".", "..") for segment in prefix.split("/")):
        raise InvalidArgument(
            f"the prefix of the root's URL {scheme}://{authority}/… has empty parts or odd characters",
            hint="Use letters, digits and . _ ~ = + , @ - between single slashes.",
        )
    return f"{scheme}://{authority}/{prefix}" if prefix else f"{scheme}://{authority}"


def locate(url: str) -> Location:
    """The two parts of a URL that `root_url` has made, or of one below it."""
    scheme, _, rest = url.partition("://")
    authority, _, key = rest.partition("/")
    return Location(f"{scheme}://{authority}", key)


def smallest_part(url: str) -> int:
    """Bytes that each part of an upload has at least, but for the last one."""
    return 1 if url.startswith("file:") else SMALLEST_PART
