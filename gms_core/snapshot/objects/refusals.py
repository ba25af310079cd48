"""What object stores answer, as sentences. Pure.

Of what the library says only a status, a store's own word for an error, and the kind of a failed connection are used: the rest may repeat signed
URLs, keys of accounts, and whole answers. For the same reason no error of the library is the cause of one of GMS: a traceback would print it.
"""

from __future__ import annotations

import re

from gms_core.errors import ConfigurationError, GmsError, PermissionRefused, SnapshotNotFound, TransferFailed

_STATUS = re.compile(r"non-2xx status code: ([1-5][0-9]{2})\b")
_WORD = re.compile(r"<Code>([A-Za-z]{1,48})</Code>")
_KIND = re.compile(r"\bkind: (Connect|Timeout|Request|Decode|Interrupted|Unknown)\b")

_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound", "InvalidBucketName"})
_CREDENTIALS = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired", "AuthenticationFailed"}
)
_NO_CREDENTIALS = ("account_name", "account must be specified")
_METADATA = ("169.254.169.254", "169.254.170.", "/latest/api/token", "/latest/meta-data", "metadata.google.internal", "/metadata/identity")
"""Where machines of clouds ask for credentials when nothing else has any."""

OPENED = "used"
"""What is tried before anything is asked of a store: only the environment can be wrong then."""

_RIGHTS = "to read it needs the rights to list and to get objects, to save or prune also those to put and to delete them"


def refusal(error: BaseException, doing: str, url: str) -> GmsError:
    """The error that says in a sentence what a store has answered.

    Args:
        error: The library's, or `FileNotFoundError`, which it raises for what is not there.
        doing: What was tried, such as ``read``.
        url: With what.
    """
    text, kind = str(error), type(error).__name__
    status = found[1] if (found := _STATUS.search(text)) else ""
    word = found[1] if (found := _WORD.search(text)) else ""
    bucket = url.split("/", 3)[2] or url
    missing = isinstance(error, FileNotFoundError)
    if not missing and any(_tells(text, one, url) for one in (*_METADATA, *_NO_CREDENTIALS)):
        return PermissionRefused(
            f"{url} cannot be {doing}: there are no credentials for it",
            hint="Set the store's own variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS or "
            "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give the machine or the pod a role. Profiles in ~/.aws are not read.",
        )
    if doing == OPENED:
        return ConfigurationError(
            f"{url} cannot be {doing}: the environment's settings or credentials for its store are not valid",
            hint="Look at its variables, AWS_…, GOOGLE_… or AZURE_…: one may be cut off, or name a file that is not there.",
        )
    if word in _NO_BUCKET:
        return SnapshotNotFound(
            f"{url} cannot be {doing}: there is no bucket {bucket}",
            hint="Make it, or correct the root's URL and the region.",
            details={"bucket": bucket},
        )
    if (
        kind in ("PermissionDeniedError", "UnauthenticatedError")
        or status in ("401", "403")
        or word in _CREDENTIALS
        or isinstance(error, PermissionError)
    ):
        why = "the credentials are not valid, or not any more" if word in _CREDENTIALS or status == "401" else "these credentials may not do that"
        return PermissionRefused(
            f"{url} cannot be {doing}: {why}{_told(status, word)}", hint=f"Look at the credentials of bucket {bucket}: {_RIGHTS}."
        )
    if (missing or status == "404") and doing in ("written", "made"):
        return TransferFailed(f"{url} cannot be {doing}: the store does not know its upload any more{_told(status, word)}", hint="Save anew.")
    if missing or status == "404":
        return SnapshotNotFound(f"{url} is not there")
    if status in ("429", "503") or word in ("SlowDown", "RequestLimitExceeded", "ServerBusy"):
        return TransferFailed(
            f"{url} cannot be {doing}: the store has asked for patience too often{_told(status, word)}",
            hint="Use fewer threads with --workers, or less at once with --option depth=1; try again later.",
        )
    if (isinstance(error, NotImplementedError) or kind == "NotSupportedError") and doing == "made":
        return TransferFailed(
            f"{url} cannot be {doing}: objects are not made only where there are none, since the environment forbids that",
            hint="Unset AWS_CONDITIONAL_PUT: two savers could not be kept apart without it.",
        )
    if status == "501" and doing == "made":
        hint = "It does not make objects only where there are none (If-None-Match: *): two savers there could not be kept apart. Use another one."
        return TransferFailed(f"{url} cannot be {doing}: the store refuses{_told(status, word)}", hint=hint)
    if status:
        hint = "Try again; the store's own status page may know more." if status.startswith("5") else "Look at the bucket's settings and its region."
        return TransferFailed(f"{url} cannot be {doing}: the store refuses{_told(status, word)}", hint=hint)
    return _unreachable(text, doing, url)


def _unreachable(text: str, doing: str, url: str) -> GmsError:
    """The error for what no store has answered."""
    if "No space left on device" in text:
        return TransferFailed(f"{url} cannot be {doing}: the disk is full", hint="Make room: gms snapshot prune removes old snapshots.")
    if "builder error" in text:
        return TransferFailed(
            f"{url} cannot be {doing}: its endpoint is not one that may be used",
            hint="An endpoint without TLS has to be allowed: AWS_ALLOW_HTTP=true, GOOGLE_ALLOW_HTTP=true or AZURE_ALLOW_HTTP=true.",
        )
    kinds = set(_KIND.findall(text))
    if _tells(text, "redirect", url):
        what, hint = "its bucket is in another region", "Set AWS_REGION, or the endpoint, to that of the bucket."
    elif _tells(text, "dns error", url):
        what, hint = "the name of its store cannot be resolved", "Look at the region, at the endpoint and at the machine's name service."
    elif "Connect" in kinds:
        what, hint = "its store cannot be reached", "Look at the region, at the endpoint and at the network between."
    elif "Timeout" in kinds:
        what, hint = "its store has not answered in time", "Try again; on a slow network use fewer threads, or raise AWS_TIMEOUT (GOOGLE_, AZURE_)."
    elif kinds or "error sending request" in text or "body error" in text:
        what, hint = "the connection to its store was cut, again and again", "Try again; look at the network between."
    else:
        what, hint = "its store, or the library obstore, does not say why", "Try again; look at the bucket with the store's own tools."
    return TransferFailed(f"{url} cannot be {doing}: {what}", hint=hint)


def _tells(text: str, word: str, url: str) -> bool:
    """Whether the library says a word of its own accord: what it tells has the object's path in it."""
    return word in text.lower() and word not in url.lower()


def _told(status: str, word: str) -> str:
    words = " ".join(part for part in (status, word) if part)
    return f" ({words})" if words else ""
