"""A process that publishes and then writes to what it has published, through a mapping of its own that it made before: what a buggy engine does.

``python stray_writer.py SOCKET POOL SIZE MANIFEST``: publishes ``SIZE`` bytes with the manifest in a file, says ``published``, and adds one to the
byte at each offset that it reads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gms_core.client import WriteLease, connect
from gms_core.layout import Identity
from gms_core.tensor_manifest import Slot, Step, StorageRecord, TensorRecord

MODEL = Identity({"content": "written"})


def slot(name: str) -> Slot:
    *modules, last = name.split(".")
    return Slot((*(Step("module", module) for module in modules), Step("parameter", last)))


def tensor(*names: str, elements: int, offset: int = 0, dtype: str = "float32") -> TensorRecord:
    """A contiguous tensor that hangs in these slots."""
    return TensorRecord(dtype, (elements,), (1,), offset, False, True, tuple(map(slot, names)))


def storage(offset: int, size: int, *tensors: TensorRecord, shared: bool = True) -> StorageRecord:
    return StorageRecord(offset, size, "arena", shared, tensors)


class StrayWriter:
    """Such a process."""

    def __init__(self, socket: Path, pool: str, size: int, manifest: Path) -> None:
        command = [sys.executable, "-m", "tests.unit.stray_writer", str(socket), pool, str(size), str(manifest)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answered("published")

    def write(self, offset: int) -> None:
        """Change one byte of what is published."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{offset}\n")
        self.process.stdin.flush()
        self._answered("written")

    def _answered(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"


@contextlib.contextmanager
def stray_writer(socket: Path, folder: Path, size: int, manifest: bytes, pool: str = "weights") -> Iterator[StrayWriter]:
    """A process that has published, and writes when it is told to, until the context ends."""
    path = folder / "manifest"
    path.write_bytes(manifest)
    writer = StrayWriter(socket, pool, size, path)
    with writer.process:
        try:
            yield writer
        finally:
            writer.process.kill()


def main(socket: str, pool: str, size: str, manifest: str) -> None:
    with connect(socket_path=Path(socket), client="stray") as session:
        lease = session.acquire(pool, "rw", MODEL, timeout_s=10)
        assert isinstance(lease, WriteLease)
        lease.arena.allocate(int(size))
        lease.trim()  # what is committed is mapped now; a commit would put a shorter copy in its place
        with mmap.mmap(_memory_file(), 0) as memory:
            lease.commit(Path(manifest).read_bytes(), MODEL)
            sys.stdout.write("published\n")
            sys.stdout.flush()
            for line in sys.stdin:
                memory[int(line)] = (memory[int(line)] + 1) % 256
                sys.stdout.write("written\n")
                sys.stdout.flush()


def _memory_file() -> int:
    """The descriptor of the only memory that this process has mapped."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            if "memfd:gms" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
    (descriptor,) = found
    return descriptor


if __name__ == "__main__":
    main(*sys.argv[1:])
