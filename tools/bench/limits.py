"""What no loader can exceed: how fast this machine copies, and how fast it reads its disk."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gms_core.cli import fio
from gms_core.devices import HOST, DeviceId
from gms_core.errors import GmsError
from tools.bench.document import Limit
from tools.bench.orders import Copy, ask

COPY_BYTES = 2**30
"""At once, at most, to find out how fast this machine copies."""
FIO_UNIT = 2**20
"""fio reads a multiple of it: files of an odd length would be read in tiny blocks."""

Tell = Callable[[str], None]


def copy_limit(device: DeviceId, size: int, tell: Tell) -> Limit:
    """What no loader can exceed, wherever its bytes are.

    Args:
        device: As GMS names it.
        size: Bytes at once, if that is not too much.
        tell: Is told what is being done.
    """
    what = f"memmove in {len(os.sched_getaffinity(0))} threads, in huge pages" if device == HOST else "cuMemcpyHtoDAsync from pinned memory"
    tell(what)
    try:
        return Limit(what, ask(Copy(str(device), min(COPY_BYTES, size))).answer.rate)
    except GmsError as error:
        return Limit(what, error=error.message)


def fio_seconds(files: Sequence[tuple[Path, int]], tell: Tell) -> Iterator[float]:
    """What fio needs to read the files past the page cache; nothing if it is not installed, or cannot."""
    if not fio.installed() or not fio_files(files):
        return
    tell("fio")
    try:
        yield fio.read_s(fio_files(files))
    except GmsError as error:
        tell(error.message)


def fio_files(files: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """Files with as many of their bytes as fio reads in large blocks. Pure."""
    return [(path, size // FIO_UNIT * FIO_UNIT) for path, size in files if size >= FIO_UNIT]


def disk_limit(files: Sequence[tuple[Path, int]], read_s: Sequence[float], plain_rate: float) -> Limit:
    """What no loader can exceed that reads the disk, but for what the disk itself remembers.

    Args:
        files: Of the checkpoint, with their bytes.
        read_s: Seconds that fio has needed for them, each time.
        plain_rate: Bytes a second of plain reads in the same run; 0 if they were not measured.
    """
    if read_s:
        return Limit("fio, libaio, of the checkpoint's files", sum(size for _, size in fio_files(files)) / statistics.median(read_s))
    if plain_rate:
        return Limit("plain reads of gms snapshot benchmark", plain_rate)
    return Limit("fio", error="fio has not read the disk: it is not installed, or could not; or the disk was not asked for")
