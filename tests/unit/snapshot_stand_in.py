"""Snapshots in tests: a transfer backend as short as it can be said, images without a server, and what is saved or restored with one."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import xxhash

from gms_core.errors import SnapshotDamaged
from gms_core.layout import Allocation, Identity, layout_digest
from gms_core.snapshot.catalogue import find
from gms_core.snapshot.manifest import BLOCK_BYTES, Device, Image
from gms_core.snapshot.on_disk import image_folder
from gms_core.snapshot.plan import lay_out, pieces
from gms_core.snapshot.restore import verify_image
from gms_core.snapshot.roots import open_roots
from gms_core.snapshot.save import save_image
from gms_core.snapshot.staging import Staging
from gms_core.snapshot.transfer import Moved, Probe
from tests.unit.publishing import MODEL

PAGE = 4096
TWO_STRIPES = BLOCK_BYTES + 3 * PAGE
"""Bytes of the smallest image that lies in two roots, nearly: with stripes of one block."""


_mkdir = os.mkdir  # tests make the one of the module fail


class Plain:
    """Moves blocks one after the other, in the thread that waits for the end."""

    name = "plain"
    directions = frozenset({"save", "restore"})

    def __init__(self):
        self.written = []

    def probe(self):
        return Probe(True, "")

    def check(self, job):
        pass

    def open(self, job, memory):
        return PlainTransfer(self, job, memory)


class PlainTransfer:
    def __init__(self, backend, job, memory):
        self.backend, self.job, self.memory, self.moved = backend, job, memory, 0

    def poll(self):
        return self.moved

    def cancel(self):
        self.job = None

    def finish(self):
        if self.job is None:
            return Moved(0, 0.0, {})
        lane, checksums = self.memory.lane(), {}
        buffer = ctypes.create_string_buffer(self.job.block_bytes)
        for piece in self.job.pieces:
            view = memoryview(buffer).cast("B")[: piece.size]
            file = self.job.files[piece.shard]
            if self.job.direction == "save":
                lane.wait(lane.from_memory(ctypes.addressof(buffer), piece.offset, piece.size))
                checksums[piece.block] = xxhash.xxh3_64_intdigest(view)
                descriptor = os.open(file.path, os.O_WRONLY)
                assert os.pwrite(descriptor, view, piece.position) == piece.size
                self.backend.written.append(piece.block)
            else:
                descriptor = os.open(file.path, os.O_RDONLY)
                assert os.preadv(descriptor, [view], piece.position) == piece.size
                checksums[piece.block] = xxhash.xxh3_64_intdigest(view)
                if checksums[piece.block] != self.job.checksums[piece.block]:
                    os.close(descriptor)
                    raise SnapshotDamaged(f"{file.path} at {piece.position} is not what was saved")
                lane.wait(lane.to_memory(piece.offset, ctypes.addressof(buffer), piece.size))
            os.close(descriptor)
            self.moved += piece.size
        lane.close()
        return Moved(self.moved, 0.0, checksums)


def roots_in(folder: Path, count: int = 2):
    """Some roots."""
    return open_roots([folder / f"root{number}" for number in range(count)], create=True)


def write_image(target, index: int = 0, size: int = TWO_STRIPES, first: bytes = b"x" * PAGE) -> Image:
    """Write an image that is zero behind its first bytes, as if it had been saved."""
    shards, stripes = lay_out(size, image_folder(index), target.places, stripe_bytes=target.plan.stripe_bytes, shard_bytes=target.plan.shard_bytes)
    for shard in shards:
        path = Path(target.folders[shard.root]) / shard.path
        with contextlib.suppress(FileExistsError):
            _mkdir(path.parent, 0o700)
        with path.open("wb") as file:
            file.truncate(shard.size)
    with (Path(target.folders[shards[0].root]) / shards[0].path).open("r+b") as file:
        file.write(first)
    data = first + bytes(size - len(first))
    work = list(pieces(stripes))
    checksums = tuple(xxhash.xxh3_64_hexdigest(data[piece.offset : piece.offset + piece.size]) for piece in work)
    digest = layout_digest(MODEL, [Allocation(0, 0, size)], b"tensors")
    device = Device("host", "host", PAGE)
    return Image("weights", 1, device, dict(MODEL.fields), digest, ((0, size),), b"tensors", shards, stripes, BLOCK_BYTES, checksums)


def save_bytes(roots, name: str = "model", first: bytes = b"x" * PAGE, images: int = 1, **options):
    """A snapshot without a server."""
    with Staging.begin(roots, name, stripe_bytes=BLOCK_BYTES, **options) as staging:
        return staging.commit([write_image(staging.target, index, first=first) for index in range(images)])


def save_pool(session, lease, roots, name: str = "model", backend=None, **options):
    """A snapshot of what a lease reads."""
    with Staging.begin(roots, name, stripe_bytes=BLOCK_BYTES, **options) as staging:
        return staging.commit([save_image(session, lease, staging.target, 0, backend or Plain()).image])


def loads(roots, wanted: str = "model"):
    """The manifest of a snapshot all of whose bytes are as they were saved."""
    with find(roots, wanted) as snapshot:
        for index in range(len(snapshot.manifest.images)):
            verify_image(snapshot, index, Plain())
        return snapshot.manifest


def identity_of(image: Image) -> Identity:
    return Identity(image.identity)
