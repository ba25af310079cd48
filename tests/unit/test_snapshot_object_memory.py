"""Memory that the backend ``object`` needs, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

MEASURED = """
import re, sys
from pathlib import Path
from gms_core.snapshot import registry
from gms_core.snapshot.manifest import Stripe
from gms_core.snapshot.memories import DiscardingMemory, memory_for
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.plan import pieces
from gms_core.snapshot.transfer import File, Job
from tests.unit.snapshot_transfers import Memory

direction, url, checksums = sys.argv[1], sys.argv[2], list(map(int, sys.argv[3:]))
size, block = 64 * 2**20, 8 * 2**20
work = list(pieces([Stripe(0, size, 0, 0)], block))
if direction == "save":
    image = Memory(size)
    for place in range(0, size, 4096):
        image.bytes[place] = 1
    memory, options = memory_for("host", ((0, size),)), {"depth": "2", "buffers": "3"}
    memory.ready(image.base)
else:
    memory, options = DiscardingMemory(), {"chunk_bytes": str(2 * 2**20)}
job = Job(direction, [File(url, "0" * 32, size)], work, checksums, block, 1 if direction == "save" else 2, options, objects=True)
Bucket(url.rpartition("/")[0]).objects()  # what the library needs for any request


def peak():  # of this program alone, which getrusage does not tell
    return int(re.search("VmHWM: *([0-9]+) kB", Path("/proc/self/status").read_text().replace("\\t", " "))[1])


before = peak()
moved = registry.find("object").open(job, memory).finish()
print((peak() - before) // 1024, *(moved.checksums[piece.block] for piece in work))
"""


def test_memory_is_bounded_when_an_image_is_large(s3):
    def measured(direction, *checksums):
        command = [sys.executable, "-c", MEASURED, direction, f"{s3.url}/shard", *checksums]
        grown, *found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.split()
        return int(grown), found

    saved, checksums = measured("save")
    restored, found = measured("restore", *checksums)
    assert found == checksums
    assert saved < 3 * 8 + 16, "three buffers, and what the library needs by itself"
    assert restored < 2 * 2 * 2 + 16, "two buffers for each of two threads"
