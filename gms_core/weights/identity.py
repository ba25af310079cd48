"""What decides whether weights that another engine has loaded are those that this one needs, as far as no engine is concerned."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from gms_core.checkpoint import cached_digest, content_digest
from gms_core.engine_log import log
from gms_core.errors import IdentityMismatch
from gms_core.layout import Identity

DUMMY = "dummy"
"""The content of weights that are not read but made up."""


def known_content(files: Sequence[Path], inner: str) -> str:
    """The digest of a checkpoint's bytes as far as it is known without reading them; `DUMMY` if none are read, empty if it is not known."""
    return DUMMY if inner == DUMMY else cached_digest(files) or ""


def check_content(files: Sequence[Path], published: Identity) -> None:
    """Compare a checkpoint whose digest was unknown when the lease was asked for with what was granted.

    The writer remembers the digest before it publishes; a checkpoint that is still unknown here is another one, or lies elsewhere, and is read.

    Args:
        files: The weight files that this engine would have read; nothing can be compared without.
        published: What the lease is on.

    Raises:
        IdentityMismatch: Something else was published.
        CheckpointNotFound: A file cannot be read.
    """
    found = published.fields.get("content", "")
    if not files or not found:
        log().warning("the digest of the checkpoint is not known: that the published weights are of the same content is not checked")
        return
    if cached_digest(files) is None:
        log().info("the checkpoint in %s is not known here: it is read once, to compare it with what is published", files[0].parent)
    content = content_digest(files)
    if content != found:
        difference = f"{content!r} != {found!r}"
        raise IdentityMismatch(
            f"the checkpoint in {files[0].parent} is not what is published: content: {difference} (expected != published)",
            hint="Use another tag for this checkpoint, or mode rw to publish it as a new generation.",
            details={"content": difference},
        )


def final_identity(promised: Identity, files: Sequence[Path]) -> Callable[[], Identity]:
    """Begin to read a checkpoint's digest; what is returned waits for it, and gives the identity with it.

    Args:
        promised: When the lease was asked for.
        files: Of the checkpoint; without any, the identity is the promised one.
    """
    if not files:
        return lambda: promised
    digest = _in_background(functools.partial(content_digest, files))
    return lambda: Identity({**promised.fields, "content": digest.result()})


def whereabouts(place: str) -> str:
    """Where a model comes from: a folder, with links resolved, or a name."""
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def plain(value: object, leave_out: Collection[str] = ()) -> object:
    """A configuration as JSON can hold it, without some keys at whatever depth."""
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        value = to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item, leave_out) for key, item in value.items() if key not in leave_out}
    if isinstance(value, (list, tuple)):
        return [plain(item, leave_out) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def digest_of(value: object) -> str:
    """A short digest of something that JSON can hold, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _in_background(work: Callable[[], str]) -> Future[str]:
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the root of a thread; raised where the result is asked for
            result.set_exception(error)

    Thread(target=run, name="gms-digest", daemon=True).start()
    return result
