"""Plain writes and reads of an object store, to compare its snapshots with.

Requests are as large as a snapshot's, and in as many threads as it has connections when it is restored; there is nothing else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from gms_core.cli.plain_loop import Part, timed
from gms_core.errors import GmsError
from gms_core.snapshot.backends.object import CHUNK_BYTES, CONNECTIONS
from gms_core.snapshot.buffers import Buffer
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.urls import locate
from gms_core.snapshot.shelves import open_shelf
from gms_core.snapshot.staged import cores


def plain_threads() -> int:
    """As many as the backend has, if nothing else is said."""
    return min(CONNECTIONS, 4 * cores())


def plain_write(url: str, name: str, size: int, threads: int) -> float:
    """Seconds to write as many bytes as an image has, in objects as large as a part of an upload; they are removed afterwards.

    Args:
        url: Of the root.
        name: What nobody else uses.
        size: Bytes.
        threads: How many.
    """
    bucket, noise = Bucket(url), os.urandom(CHUNK_BYTES)
    keys = {f"{name}/plain/{number}": min(CHUNK_BYTES, size - place) for number, place in enumerate(range(0, size, CHUNK_BYTES))}
    try:
        return _timed(list(keys), threads, lambda key, _: bucket.write(key, noise[: keys[key]]))
    finally:
        bucket.delete(keys)


def plain_read(files: Sequence[tuple[str, int]], threads: int) -> float:
    """Seconds to read objects into buffers.

    Args:
        files: URL and bytes of each.
        threads: How many.
    """
    buckets = {base: Bucket(base) for base in {locate(url).base for url, _ in files}}
    shards = [buckets[locate(url).base].open_shard(locate(url).key, size, CHUNK_BYTES, 1) for url, size in files]
    parts = [(shard, place) for shard in shards for place in range(0, shard.size, CHUNK_BYTES)]
    return _timed(parts, threads, lambda part, buffer: part[0].read(buffer.view[: min(CHUNK_BYTES, part[0].size - part[1])], part[1]))


def remove(url: str, name: str) -> None:
    """Leave nothing of a name, not even what tells that its numbers were used."""
    with contextlib.suppress(GmsError):
        open_shelf([url]).prune(name, keep=0)
    with contextlib.suppress(GmsError):
        bucket = Bucket(url)
        bucket.delete(f"{name}/{key}" for key in bucket.objects(name))


def _timed(parts: Sequence[Part], threads: int, move: Callable[[Part, Buffer], None]) -> float:
    return timed(parts, threads, CHUNK_BYTES, lambda: contextlib.nullcontext(move))
