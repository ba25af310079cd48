"""What tests of transfers need: an image with gaps, its files in several roots, and memory whose copies end late."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path

import xxhash

from gms_core.snapshot import registry
from gms_core.snapshot.backends import asking
from gms_core.snapshot.manifest import PAGE_BYTES, Stripe
from gms_core.snapshot.memories import Arrival, memory_for
from gms_core.snapshot.plan import Extents, pieces
from gms_core.snapshot.running import moves_objects
from gms_core.snapshot.transfer import File, Job

GAPS = ((0, 5 * PAGE_BYTES), (5 * PAGE_BYTES, 3 * PAGE_BYTES), (11 * PAGE_BYTES, PAGE_BYTES), (40 * PAGE_BYTES, 28 * PAGE_BYTES))
"""Of 37 pages: two allocations side by side, and two that lie apart."""
asking.DEADLINE_S = 60.0  # a busy machine loads a library slowly, and what is collected must not depend on it
SMALL = {"chunk_bytes": str(2 * PAGE_BYTES), "direct": "always"}


class Memory:
    """Addresses of this process, as an arena has them."""

    def __init__(self, size):
        self.bytes = mmap.mmap(-1, size)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))


class Scene:
    """An image of random bytes, and where it lies.

    Args:
        folder: Has a folder for each root.
        roots: How many.
        block_pages: Of a block.
        stripe_blocks: Of a stripe.
    """

    def __init__(self, folder: Path, roots=2, allocations=GAPS, block_pages=4, stripe_blocks=2):
        self.allocations, self.block = allocations, block_pages * PAGE_BYTES
        self.size = sum(size for _, size in allocations)
        self.data = os.urandom(self.size)
        self.extent = max((place + size for place, size in allocations), default=0) + PAGE_BYTES
        ends, self.stripes = [0] * roots, []
        for number, offset in enumerate(range(0, self.size, stripe_blocks * self.block)):
            length = min(stripe_blocks * self.block, self.size - offset)
            self.stripes.append(Stripe(offset, length, number % roots, ends[number % roots]))
            ends[number % roots] += length
        self.files = []
        for number, end in enumerate(ends):
            path = folder / f"root{number}" / "00000.shard"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(end))
            self.files.append(File(path, f"{number:032x}", end))
        self.pieces = list(pieces(self.stripes, self.block))
        self.checksums = [xxhash.xxh3_64_intdigest(self.data[piece.offset : piece.offset + piece.size]) for piece in self.pieces]

    def fill_files(self):
        """Put the image into the files, as a save does."""
        for stripe in self.stripes:
            with self.files[stripe.shard].path.open("r+b") as file:
                file.seek(stripe.position)
                file.write(self.data[stripe.offset : stripe.offset + stripe.size])
        for file in self.files:
            with file.path.open("r+b") as opened:
                os.fsync(opened.fileno())

    def files_hold_image(self):
        return all(
            self.files[stripe.shard].path.read_bytes()[stripe.position :][: stripe.size] == self.data[stripe.offset : stripe.offset + stripe.size]
            for stripe in self.stripes
        )

    def filled(self):
        """Memory that has the image, and zeros in its gaps."""
        memory, begin = Memory(self.extent), 0
        for place, size in self.allocations:
            memory.bytes[place : place + size] = self.data[begin : begin + size]
            begin += size
        return memory

    def job(self, direction="restore", workers=0, **options):
        checksums = self.checksums if direction == "restore" else ()
        return Job(direction, self.files, self.pieces, checksums, self.block, workers, SMALL | options)

    def save(self, name="staged", memory_of=None, **options):
        """Save from filled memory."""
        filled = self.filled()
        with (memory_of or memory_for)("host", self.allocations) as memory:
            memory.ready(filled.base)
            return registry.find(name).open(self.job("save", **options), memory).finish()

    def restore(self, name="staged", memory_of=None, **options):
        """Restore to empty memory, which comes late; returns it and what the transfer tells."""
        target = Memory(self.extent)
        with (memory_of or memory_for)("host", self.allocations) as memory:
            transfer = registry.find(name).open(self.job(**options), memory)
            memory.ready(target.base)
            return target, transfer.finish()

    def holds(self, target):
        """Whether memory that was restored to has the image."""
        begin = 0
        for place, size in self.allocations:
            if target.bytes[place : place + size] != self.data[begin : begin + size]:
                return False
            begin += size
        return True

    def flip(self, piece):
        """Change one bit in the middle of a block's file."""
        path, position = self.files[piece.shard].path, piece.position + piece.size // 2
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 0x10]))
            os.fsync(file.fileno())

    def without(self, **changes):
        """A job with changes."""
        return replace(self.job(), **changes)


class LateMemory:
    """Memory whose copies are made when they are waited for, as those of a device may be: a buffer that is used too early shows.

    Attributes:
        hashes: Whether it can find checksums, as a GPU can.
        ready_after: Copies that a lane has begun before it can, as when a driver has to compile something first.
        refuses_after: Batches of a lane that it hashes before it refuses; None for all.
        changes: Whether its first copy of all arrives with another byte.
    """

    hashes = changes = False
    ready_after, refuses_after = 0, None

    def __init__(self, device, allocations):
        self.extents, self.arrival = Extents(allocations), Arrival()
        self.registered, self.unregistered, self.refuse = [], [], None
        self.lock, self.lanes, self.too_early = threading.Lock(), [], []
        self.prepared = 0

    def ready(self, base):
        self.arrival.ready(base)

    def never(self):
        self.arrival.never()

    def lane(self, *, spin=False):
        lane = LateLane(self)
        self.lanes.append(lane)
        return lane

    def prepare_hash(self, block_bytes):
        self.prepared = block_bytes

    def register(self, address, size, *, writable=True):
        with self.lock:
            if self.refuse is not None and self.refuse(writable):
                raise self.refuse(writable)
            self.registered.append((address, size, writable))

    def unregister(self, address):
        with self.lock:
            self.unregistered.append(address)
            end = next(address + size for begin, size, _ in self.registered if begin == address)
            copies = [copy for lane in self.lanes for pending in lane.copies for copy in pending]
            if any(address <= place < end for target, source, _ in copies for place in (target, source)):
                self.too_early.append(address)

    def places(self, offset, size):
        return self.arrival.places(self.extents, offset, size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.never()
        assert not self.too_early, "host memory was given up while a copy from or to it was under way"


class HashingMemory(LateMemory):
    """As a GPU's."""

    hashes = True


class LateLane:
    def __init__(self, memory):
        self.memory, self.extents, self.waiter, self.copies, self.hashed = memory, memory.extents, memory.arrival.waiter(), [], []

    def arrive(self):
        self.waiter.base()

    def abandon(self):
        self.waiter.abandon()

    begun = 0

    def to_memory(self, offset, source, size):
        base = self.waiter.base()
        self.begun += 1
        self.copies.append([(base + place, source + inside, length) for place, inside, length in self.extents.ranges(offset, size)])
        return len(self.copies)

    def from_memory(self, target, offset, size):
        base = self.waiter.base()
        self.copies.append([(target + inside, base + place, length) for place, inside, length in self.extents.ranges(offset, size)])
        return len(self.copies)

    def wait(self, ticket):
        for pending in self.copies[:ticket]:
            for copy in pending:
                ctypes.memmove(*copy)
                if self.memory.changes:
                    self.memory.changes = False
                    ctypes.memset(copy[0], (ctypes.string_at(copy[0], 1)[0] + 1) % 256, 1)
            pending.clear()

    def hash(self):
        self.waiter.base()  # it has arrived
        return LateHash(self) if self.memory.hashes and self.memory.prepared else None

    def close(self):
        self.wait(len(self.copies))


class LateHash:
    """As the hash of a GPU: of what lies in the memory once the copies before it have been made, and no others.

    It tells its lane of each batch: how many blocks it has, how many copies were begun before, and how many batches are under way with it.
    """

    at_once = 3

    def __init__(self, lane):
        self.lane, self.asked = lane, {}

    @property
    def is_ready(self):
        return self.lane.begun >= self.lane.memory.ready_after

    def begin(self, blocks):
        assert 0 < len(blocks) <= self.at_once
        most = self.lane.memory.refuses_after
        if most is not None and len(self.lane.hashed) >= most:
            return None
        self.lane.copies.append([])
        self.asked[len(self.lane.copies)] = blocks
        self.lane.hashed.append((len(blocks), self.lane.begun, len(self.asked)))
        return len(self.lane.copies)

    def end(self, ticket):
        self.lane.wait(ticket)
        base = self.lane.waiter.base()
        return [
            xxhash.xxh3_64_intdigest(b"".join(ctypes.string_at(base + place, length) for place, _, length in self.lane.extents.ranges(offset, size)))
            for offset, size in self.asked.pop(ticket)
        ]


@functools.cache
def _is_usable(name):
    return registry.find(name).probe().usable


def usable_backends(*, gpu=False):
    """What this machine can run, beside what every machine can, with files and the memory of the host or of a GPU."""
    left_out = ("nixl-ucx", "nixl-posix-direct") if gpu else ("nixl-ucx", "nixl-gds", "cufile-gds")
    return [name for name in registry.names() if name not in left_out and not moves_objects(registry.find(name)) and _is_usable(name)]


def transfer_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gms-transfer")]


def rings():
    """Begins of the mappings that a forked child does not get, as buffers are."""
    found, begin = set(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            begin = name.split("-")[0]
        elif name == "VmFlags:" and "dc" in line.split():
            found.add(int(begin, 16))
    return found


def descriptors():
    return sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}"))
