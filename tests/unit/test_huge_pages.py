"""A process's memory in huge pages: the same bytes at the same addresses, and less for the kernel to do."""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gms_core.failover import huge_pages

SIZE = 64 * 2**20

COLLAPSES = """
import mmap, re, sys
from pathlib import Path
from gms_core.failover.huge_pages import collapse

def huge():
    return int(re.search(r"AnonHugePages:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024

memory = mmap.mmap(-1, %d, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE) if len(sys.argv) > 1 else None
for at in range(0, len(memory), 4096):
    memory[at : at + 8] = at.to_bytes(8, "little")
sparse = mmap.mmap(-1, %d, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(sparse), 2**21):
    sparse[at] = 1
before = huge()
done = collapse()
assert all(int.from_bytes(memory[at : at + 8], "little") == at for at in range(0, len(memory), 4096))
print(before, huge(), done.bytes)
"""


def in_process(*arguments: str) -> list[int]:
    """What a fresh process says of its memory: bytes in huge pages before and after, and how many it put there."""
    found = subprocess.run([sys.executable, "-c", COLLAPSES % (SIZE, SIZE), *arguments], capture_output=True, text=True, check=True)
    return list(map(int, found.stdout.split()))


def supported() -> bool:
    """Whether the kernel does it at all."""
    memory = mmap.mmap(-1, 2 * huge_pages.HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * len(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -(-address // huge_pages.HUGE_BYTES) * huge_pages.HUGE_BYTES
    return huge_pages._libc.madvise(start, huge_pages.HUGE_BYTES, huge_pages._MADV_COLLAPSE) == 0 or ctypes.get_errno() != errno.EINVAL


@pytest.mark.skipif(not supported(), reason="needs Linux 6.1 with transparent huge pages")
def test_what_is_in_use_is_in_huge_pages_afterwards_and_nothing_else():
    before, after, done = in_process()
    assert after - before >= SIZE - 2 * huge_pages.HUGE_BYTES
    assert done < SIZE + SIZE // 2, "memory of which a page here and there is in use must not become as large as it looks"


def test_memory_that_cannot_be_collapsed_stays_as_it_is():
    assert len(in_process("not huge")) == 3


def test_nothing_is_begun_once_the_time_is_over():
    assert huge_pages.collapse(limit_s=-1.0).bytes == 0


def test_only_anonymous_private_writable_memory_is_this_process_s_own(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), SIZE, flags=mmap.MAP_PRIVATE) as private, mmap.mmap(-1, SIZE) as shared:
        for memory in (private, shared):
            view = ctypes.c_char.from_buffer(memory)
            address = ctypes.addressof(view)
            assert not any(start <= address < end for start, end in huge_pages._own())
            del view
    maps = Path("/proc/self/maps").read_text()
    stack = int(re.search(r"^([0-9a-f]+)-.*\[stack\]$", maps, re.M)[1], 16)  # type: ignore[index]
    assert not any(start <= stack < end for start, end in huge_pages._own())


def test_a_kernel_without_it_is_asked_only_so_often(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Libc:
        @staticmethod
        def madvise(address: int, *_: int) -> int:
            asked.append(address)
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(huge_pages, "_libc", Libc)
    monkeypatch.setattr(huge_pages, "_ranges", lambda: iter(range(10**6)))
    done = huge_pages.collapse()
    assert done.bytes == 0
    assert len(asked) < 100
