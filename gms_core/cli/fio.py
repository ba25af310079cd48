"""fio, where it is installed: what the program that everybody measures disks with makes of the same files, with the same kind of memory."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gms_core.config import child_environment
from gms_core.errors import TransferFailed

BLOCK_BYTES = 8 * 2**20
"""At once, at most: what the default backend does."""
DEPTH = 16
"""Transfers under way at a time, over all files."""
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""fio asks for huge pages from a pool of their own alone, which few machines have; so its allocator does."""


def installed() -> bool:
    """Whether there is one to be run."""
    return shutil.which("fio") is not None


def read_s(files: Sequence[tuple[Path, int]]) -> float:
    """Seconds to read files, all at once and past the page cache.

    Args:
        files: Path and bytes of each.

    Raises:
        TransferFailed: It could not, or says nothing that can be understood.
    """
    return _run("read", files, "--readonly")


def write_s(files: Sequence[tuple[Path, int]]) -> float:
    """Seconds to write files, and until the disks have them.

    Args:
        files: Path and bytes of each.

    Raises:
        TransferFailed: It could not, or says nothing that can be understood.
    """
    return _run("write", files, "--end_fsync=1", "--fallocate=posix")


def _run(direction: str, files: Sequence[tuple[Path, int]], *options: str) -> float:
    depth = max(1, DEPTH // max(1, len(files)))
    command = ["fio", "--output-format=json", "--ioengine=libaio", "--direct=1", f"--iodepth={depth}", "--mem=malloc"]
    command += [f"--rw={direction}", *options]
    for number, (path, size) in enumerate(files):
        name = str(path).replace(":", "\\:")  # a colon separates names for it
        block = min(BLOCK_BYTES, size & -size)  # it leaves out what is no whole block
        command += [f"--name={number}", f"--filename={name}", f"--size={size}", f"--bs={block}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=child_environment(**_HUGE_PAGES))
    try:
        jobs: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        told = [job[direction] for job in jobs]
        moved, spent_ms = sum(int(one["io_bytes"]) for one in told), max(int(one["runtime"]) for one in told)
    except (ValueError, KeyError, TypeError):
        moved, spent_ms = 0, 0
    if done.returncode or moved != sum(size for _, size in files):
        reason = (done.stderr or done.stdout).strip().partition("\n")[0][:300]
        raise TransferFailed(f"fio could not {direction} {len(files)} files: {reason}")
    return max(spent_ms, 1) / 1000
