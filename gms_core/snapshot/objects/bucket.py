"""A root in an object store: small objects, listings, and shards that are read and written in parts. The only module that knows obstore.

What is read from an object is copied once, from the library's pieces into a buffer; what is written leaves from one, without a copy.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gms_core.config import store_timeout
from gms_core.errors import BackendUnavailable, GmsError, SnapshotDamaged, SnapshotNotFound, TransferFailed
from gms_core.snapshot.objects.refusals import OPENED, refusal
from gms_core.snapshot.objects.urls import locate
from gms_core.snapshot.transfer import Probe

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore

NEEDED = (0, 12)
"""The first version of obstore that gives up an upload when it is told to."""
RETRIES = 6
"""Of each request that a store answers with a fault of its own, or asks to be sent later, or whose connection is cut."""
RETRY_S = 60.0
"""Seconds from a request's begin after which it is not tried again."""
STREAM_BYTES = 2**18
"""Bytes that the library collects of a range before it hands them over. With what it needs itself, that is about 2 MiB for each thread (measured)."""
_CONFLICTS = 10
"""Times that an object is asked for which could not be made, since there is one, and which is not there."""
_LONGEST = 2**30
"""Bytes of an object that is read whole: far more than any manifest has."""
_INSTALL = "Install it: pip install gms[object]"


_TIMEOUT_S = 30.0
"""The library's, if the environment names none."""
_UNITS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "secs": 1.0, "m": 60.0, "min": 60.0, "mins": 60.0, "h": 3600.0, "": 1.0}


class Found(NamedTuple):
    """What a listing says of an object.

    Attributes:
        size: Bytes.
        modified: When it was made, by the store's clock.
    """

    size: int
    modified: dt.datetime


def probe() -> Probe:
    """Whether the library is there, without importing it."""
    try:
        version = importlib.metadata.version("obstore")
    except importlib.metadata.PackageNotFoundError:
        return Probe(False, "the library obstore is not installed; pip install gms[object] brings it")
    if tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2]) < NEEDED:
        return Probe(False, f"obstore {version} is older than {'.'.join(map(str, NEEDED))}; pip install --upgrade gms[object] brings a newer one")
    return Probe(True, f"obstore {version}: S3, Google Cloud Storage, Azure Blob Storage, and stores that speak like them")


def open_store(base: str) -> ObjectStore:
    """The library's store for a `Location.base`. Nothing is asked of it yet.

    Raises:
        BackendUnavailable: The library is not installed.
        PermissionRefused: Nothing says whose store it is.
        ConfigurationError: The environment's settings for it are not valid.
    """
    found = probe()
    if not found.usable:
        raise BackendUnavailable(f"object stores cannot be used here: {found.reason}", hint=_INSTALL)
    try:
        from obstore.store import LocalStore, from_url
    except ImportError as error:
        raise BackendUnavailable(f"object stores cannot be used here: obstore cannot be imported: {error}", hint=_INSTALL) from error
    if base == "file://":
        return LocalStore("/")
    retries: Any = {
        "max_retries": RETRIES,
        "retry_timeout": dt.timedelta(seconds=RETRY_S),
        "backoff": {"init_backoff": dt.timedelta(seconds=0.1), "max_backoff": dt.timedelta(seconds=5), "base": 2},
    }
    with explained(OPENED, base):
        return from_url(base, retry_config=retries)


def timeout_s(url: str) -> float:
    """Seconds that one try of a request may take, which users set in the environment, such as ``AWS_TIMEOUT=120s``."""
    kind = {"g": "GOOGLE", "a": "AZURE"}.get(url[0], "AWS")
    found = re.findall(r"([0-9]+)\s*([a-z]*)", store_timeout(kind).lower())
    return sum(float(number) * _UNITS.get(unit, 3600.0) for number, unit in found) or _TIMEOUT_S


@contextlib.contextmanager
def explained(doing: str, url: str) -> Iterator[None]:
    """Raise what `refusal` says for each error of the library."""
    try:
        yield
    except GmsError:
        raise
    except Exception as error:  # noqa: BLE001 - the library has a dozen kinds, and its text is not to be repeated
        raise refusal(error, doing, url) from None


class Bucket:
    """An object store from a prefix on. Safe to use from any thread.

    Attributes:
        url: Of the prefix.

    Args:
        url: As `root_url` makes it.
        store: The library's, of the whole bucket; made if it is not given.
    """

    def __init__(self, url: str, store: ObjectStore | None = None) -> None:
        self.url = url
        base, key = locate(url)
        self._prefix = f"{key}/" if key else ""
        self._store = open_store(base) if store is None else store

    def url_of(self, key: str) -> str:
        """The URL of one of its objects, for people."""
        return f"{self.url}/{key}"

    def read(self, key: str) -> bytes:
        """All of a small object.

        Raises:
            SnapshotNotFound: It is not there.
            SnapshotDamaged: It is far too long.
            PermissionRefused: The credentials do not allow it.
            TransferFailed: The store does not answer as it should.
        """
        import obstore

        with explained("read", self.url_of(key)):
            found = obstore.get(self._store, self._prefix + key)
            if found.meta["size"] > _LONGEST:
                raise SnapshotDamaged(f"{self.url_of(key)} has more than {_LONGEST} bytes", hint="It is not what a save has written.")
            return bytes(found.bytes())

    def write(self, key: str, data: bytes) -> None:
        """Make a small object, or replace it.

        Raises:
            PermissionRefused: The credentials do not allow it.
            TransferFailed: The store does not answer as it should; whether the object was made is not known then.
        """
        import obstore

        with explained("written", self.url_of(key)):
            obstore.put(self._store, self._prefix + key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bytes | None:
        """Make a small object if there is none of that name: of all who try that, one alone makes it.

        Returns:
            None if it is there as it was given: a request that was sent twice, since its first answer was lost, meets its own object. Else what is
            there in its place.

        Raises:
            PermissionRefused: The credentials do not allow it.
            TransferFailed: The store does not answer as it should; whether the object was made is not known then.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        for left in reversed(range(_CONFLICTS)):
            with explained("made", self.url_of(key)):
                try:
                    obstore.put(self._store, self._prefix + key, data, mode="create", use_multipart=False)
                    return None
                except (AlreadyExistsError, PreconditionError):
                    pass
            try:
                there = self.read(key)
            except SnapshotNotFound as error:  # it was deleted between the two, or the store was busy with another request for it
                if not left:
                    raise TransferFailed(
                        f"{self.url_of(key)} cannot be made: the store says that it is there, and that it is not", hint="Try again."
                    ) from error
                continue
            return None if there == data else there
        raise AssertionError

    def keeps_what_is_there(self, key: str, data: bytes) -> bool:
        """Whether the store refuses to make an object that is there already, as it should: some that speak like S3 replace it.

        Args:
            key: Of an object.
            data: What it holds, so that nothing is lost where it is replaced.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with explained("made", self.url_of(key)):
            try:
                obstore.put(self._store, self._prefix + key, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return True
        return False

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""
        import obstore

        wanted = [self._prefix + key for key in keys]
        if not wanted:
            return
        with explained("removed", f"{locate(self.url).base}/{wanted[0]}"):
            try:
                obstore.delete(self._store, wanted)
            except FileNotFoundError:
                for key in wanted:
                    with contextlib.suppress(FileNotFoundError):
                        obstore.delete(self._store, key)

    def objects(self, folder: str = "") -> dict[str, Found]:
        """All objects below a folder, by their names from there.

        Raises:
            SnapshotNotFound: There is no such bucket.
            PermissionRefused: The credentials do not allow it.
            TransferFailed: The store does not answer as it should.
        """
        import obstore

        prefix = f"{self._prefix}{folder}/" if folder else self._prefix
        found: dict[str, Found] = {}
        with explained("listed", self.url_of(folder) if folder else self.url):
            for page in obstore.list(self._store, prefix.rstrip("/") or None, chunk_size=1000):
                found.update({one["path"][len(prefix) :]: Found(one["size"], one["last_modified"]) for one in page})
        return found

    def has(self, key: str) -> bool:
        """Whether there is an object."""
        return self._look(key) is not None

    def modified(self, key: str) -> dt.datetime:
        """When an object was made, by the store's clock.

        Raises:
            SnapshotNotFound: It is not there.
        """
        found = self._look(key)
        if found is None:
            raise SnapshotNotFound(f"{self.url_of(key)} is not there")
        return found.modified

    def _look(self, key: str) -> Found | None:
        import obstore

        with explained("looked at", self.url_of(key)):
            try:
                one = obstore.head(self._store, self._prefix + key)
            except FileNotFoundError:
                return None
            return Found(one["size"], one["last_modified"])

    def folders(self) -> list[str]:
        """Names of what has objects below it."""
        import obstore

        with explained("listed", self.url):
            found = obstore.list_with_delimiter(self._store, self._prefix.rstrip("/") or None)
            return sorted(path[len(self._prefix) :].rstrip("/") for path in found["common_prefixes"])

    def open_shard(self, key: str, size: int, part_bytes: int, parts: int) -> ShardObject:
        """A shard, for reading or for writing. Nothing is asked of the store yet.

        Args:
            key: Of its object.
            size: Bytes that it has, or will have.
            part_bytes: When it is written: bytes of each write, and of each part of the upload, but for the last one.
            parts: Under way at once.
        """
        return ShardObject(self._store, self._prefix + key, self.url_of(key), size, part_bytes, parts)


class ShardObject:
    """One shard's object. A thread reads of it what it wants; it is written by one thread, from its begin to its end.

    Attributes:
        path: Its URL.
        size: Bytes that it has to have.
    """

    def __init__(self, store: ObjectStore, key: str, url: str, size: int, part_bytes: int, parts: int) -> None:
        self.path = url
        self.size = size
        self._store, self._key = store, key
        self._part_bytes, self._parts = part_bytes, parts
        self._writer: WritableFile | None = None
        self._written = 0

    def read(self, view: memoryview, position: int) -> None:
        """Fill a view from a position on. A connection that is cut is taken up again where it ended, as often as a request is tried again.

        Raises:
            SnapshotNotFound: The object is not there any more.
            SnapshotDamaged: It ends before.
            PermissionRefused: The credentials do not allow it, or not any more.
            TransferFailed: The store does not answer as it should.
        """
        import obstore

        done, size = 0, len(view)
        with explained(f"read at position {position}", self.path):
            try:
                found = obstore.get(self._store, self._key, options={"range": (position, position + size)})
            except Exception as error:
                if "status code: 416" in str(error):  # it begins behind the end
                    raise self.too_short() from None
                raise
            if found.range != (position, position + size):
                raise self.too_short(found.meta["size"])
            for piece in found.stream(min_chunk_size=STREAM_BYTES):
                end = done + len(piece)
                view[done:end] = piece
                done = end
        if done < size:
            raise self.too_short(position + done)

    def write(self, view: memoryview, position: int) -> None:
        """Go on writing, where the last write has ended. The view is read from later on, until `memoryview.release` can be called on it.

        Raises:
            PermissionRefused: The credentials do not allow it, or not any more.
            TransferFailed: The store does not answer as it should; perhaps to an earlier part.
        """
        import obstore

        if position != self._written:
            raise TransferFailed(f"{self.path} is to be written from position {position} on, and it has {self._written} bytes so far")
        self._written += len(view)
        with explained("written", self.path):
            if self._writer is None:
                self._writer = obstore.open_writer(self._store, self._key, buffer_size=self._part_bytes, max_concurrency=self._parts)
            self._writer.write(view)

    def complete(self) -> None:
        """Wait until all parts have arrived, and make the object of them.

        Raises:
            PermissionRefused: The credentials do not allow it, or not any more.
            TransferFailed: The store does not answer as it should.
        """
        if self._writer is None:
            return
        if self._written != self.size:
            raise TransferFailed(f"{self.path} is to have {self.size} bytes, and {self._written} were written")
        try:
            with explained("written", self.path):
                self._writer.close()
        except GmsError:
            # If only the answer was lost, the store does not know the upload any more when it is asked again. Objects appear whole, and nobody else
            # writes this one.
            if not self._is_whole():
                raise
        self._writer = None

    def _is_whole(self) -> bool:
        import obstore

        try:
            return bool(obstore.head(self._store, self._key)["size"] == self.size)
        except Exception:  # noqa: BLE001 - what is told is why it could not be completed
            return False

    def close(self) -> None:
        """Give up what was written and not completed, as far as the store can be told so. Idempotent."""
        writer, self._writer = self._writer, None
        self.__dict__.pop("_store", None)  # and its connections, however long an error keeps this object
        if writer is not None:
            with contextlib.suppress(Exception):  # the object never comes into being; what its parts cost, a rule of the bucket ends
                writer.__exit__(TransferFailed, None, None)

    def too_short(self, end: int | None = None) -> GmsError:
        """It ends where it must not."""
        where = "before" if end is None else f"at position {end}"
        return SnapshotDamaged(
            f"{self.path} ends {where}, it must have {self.size} bytes", hint="Restore another version of the snapshot, or save it anew."
        )

    def damaged(self, position: int, size: int, found: int, saved: int) -> GmsError:
        """A block has another checksum than it had."""
        return SnapshotDamaged(
            f"{self.path} is damaged: the {size} bytes at position {position} have the checksum {found:016x}, they were saved with {saved:016x}",
            hint="Restore another version of the snapshot, or save it anew.",
            details={"file": self.path, "position": str(position)},
        )
