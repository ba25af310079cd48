"""Free memory of a server goes back to the system, and looking for it costs little while there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gms_core.server.heap import GROWTH_BYTES, Heap

SCATTERED = """
from gms_core.server.heap import Heap, resident_bytes
heap = Heap()
objects = [bytes(3000) for _ in range(20_000)]
used = objects[::50] + [bytes(3000)]
del objects
before = resident_bytes()
print(heap.trim(), (before - resident_bytes()) >> 20, sum(map(len, used)))
"""


def test_heap_goes_back_when_what_is_used_lies_between() -> None:
    done = subprocess.run([sys.executable, "-c", SCATTERED], capture_output=True, text=True, check=True)
    grown, mib, used = done.stdout.split()
    assert (grown, int(used)) == ("True", 401 * 3000)
    assert int(mib) > 40  # of 57


@pytest.mark.parametrize("trim", [True, False], ids=["glibc", "another libc"])
def test_memory_is_looked_through_only_when_the_process_has_grown(trim: bool) -> None:
    calls: list[object] = []
    sizes = iter(
        [
            100,  # at the start
            100 + GROWTH_BYTES - 1,  # not enough
            90,  # smaller: growth counts from here
            *([90 + GROWTH_BYTES, 95] if trim else [90 + GROWTH_BYTES]),  # once before it is given back, once after
            95 + GROWTH_BYTES - 1,
        ]
    )
    heap = Heap(lambda: next(sizes))
    heap._malloc_trim = calls.append if trim else None
    assert [heap.trim() for _ in range(4)] == [False, False, True, False]
    assert len(calls) == trim
