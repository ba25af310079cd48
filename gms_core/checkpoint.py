"""Digests of a checkpoint's bytes, remembered by file, so that the bytes are read once and not by every engine that starts."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
import xxhash

from gms_core.config import settings
from gms_core.errors import CheckpointNotFound

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 2**20
"""A file's digest is the digest of its chunks' digests, so that threads can share one large file."""
READ_BYTES = 8 * 2**20
THREADS = 8
"""Each reads and digests in turn and waits for the disk most of the time, so their number is not that of the processor's cores."""
MOST_ENTRIES = 20_000
"""Entries of the cache; the oldest go first."""

WEIGHTS = ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt")
"""Names of weight files; the first pattern with a match counts."""

_Cache = dict[str, str]


def find_weights(folder: Path, patterns: Sequence[str] = WEIGHTS) -> list[Path]:
    """The weight files of a folder; none if it has none, or is none. Reads no file."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    return []


def cached_digest(files: Sequence[Path], cache_dir: Path | None = None) -> str | None:
    """The digest of a checkpoint as far as it is known, with none of its bytes read.

    Args:
        files: All weight files of the checkpoint.
        cache_dir: Where digests are remembered; the setting if None.

    Returns:
        The digest, or None if there are no files, one of them is missing, or one has changed since it was read.
    """
    if not files:
        return None
    known = _load(_cache_file(cache_dir))
    try:
        parts = [(path.name, path.stat().st_size, known.get(_key(path))) for path in files]
    except OSError:
        return None
    found = [(name, size, digest) for name, size, digest in parts if digest is not None]
    return _combine(found) if len(found) == len(parts) else None


def content_digest(files: Sequence[Path], cache_dir: Path | None = None, *, force: bool = False) -> str:
    """The digest of a checkpoint: over the names, lengths and all bytes of its weight files, in any order and any directory.

    Files that the cache knows (by device, inode, size and both times of change, one of which no program can set) are not read again. Processes that
    ask at the same time read once: the others wait.

    Args:
        files: All weight files of the checkpoint.
        cache_dir: Where digests are remembered; the setting if None.
        force: Read all files, whatever the cache says.

    Raises:
        CheckpointNotFound: There are no files, or one cannot be read.
    """
    if not files:
        raise CheckpointNotFound("a checkpoint without weight files has no digest")
    cache = _cache_file(cache_dir)
    try:
        with _only_one(cache):
            known = {} if force else _load(cache)
            unknown = [path for path in files if _key(path) not in known]
            keys = {path: _key(path) for path in unknown}
            for path, digest in _digest_files(unknown).items():
                if _key(path) == keys[path]:
                    known[keys[path]] = digest
                else:
                    raise CheckpointNotFound(f"{path} was changed while it was read", hint="Start again once the checkpoint is complete.")
            if unknown:
                _store(cache, {**_load(cache), **known} if force else known)
            return _combine([(path.name, path.stat().st_size, known[_key(path)]) for path in files])
    except OSError as error:
        raise CheckpointNotFound(f"the checkpoint cannot be read: {error}") from error


def _combine(parts: Sequence[tuple[str, int, str]]) -> str:
    hasher = xxhash.xxh3_128()
    for name, size, digest in sorted(parts):
        hasher.update(f"{name}\0{size}\0{digest}\n".encode())
    return f"xxh3:{hasher.hexdigest()}"


def _key(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _digest_files(files: Sequence[Path]) -> dict[Path, str]:
    """Read files. What nobody has begun to read is left when one cannot be read or this thread is interrupted: a checkpoint takes minutes."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="gms-digest") as pool:
        try:
            chunks = {path: [pool.submit(_chunk_reader(path), start) for start in _starts(path)] for path in files}
            done, _ = wait([chunk for found in chunks.values() for chunk in found], return_when=FIRST_EXCEPTION)
            for chunk in done:
                chunk.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {path: xxhash.xxh3_128_hexdigest(b"".join(chunk.result() for chunk in found)) for path, found in chunks.items()}


def _starts(path: Path) -> range:
    """Where the chunks of a file begin; an empty one has one, too."""
    return range(0, max(path.stat().st_size, 1), CHUNK_BYTES)


def _chunk_reader(path: Path) -> Callable[[int], bytes]:
    def digest(start: int) -> bytes:
        hasher = xxhash.xxh3_128()
        buffer = memoryview(bytearray(READ_BYTES))
        end = start + CHUNK_BYTES
        with path.open("rb", buffering=0) as file:
            while start < end:
                count = os.preadv(file.fileno(), [buffer[: min(READ_BYTES, end - start)]], start)
                if count == 0:
                    break
                hasher.update(buffer[:count])
                start += count
        return hasher.digest()

    return digest


def _cache_file(cache_dir: Path | None) -> Path:
    return (cache_dir or settings().cache_dir) / "digests.json"


def _load(path: Path) -> _Cache:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Cache)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be used and is made anew: %s", path, error)
        return {}


def _store(path: Path, entries: _Cache) -> None:
    """Replace the cache whole. That it cannot be written costs the next engine a reading, and is no error."""
    kept = dict(list(entries.items())[-MOST_ENTRIES:])
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".digests-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(kept))
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("digests cannot be remembered in %s: %s", path, error)


@contextlib.contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """Hold a lock beside the cache; where the directory cannot be written, go on without."""
    try:
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(cache.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("digests cannot be remembered in %s: %s", cache, error)
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
