"""Audit on a real GPU: another process maps published memory writable, which CUDA lets it, and the tensor that it writes to is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gms_core.audit import Audited
from gms_core.client import WriteLease
from gms_core.devices import list_gpus
from gms_core.layout import Identity
from gms_core.tensor_manifest import encode
from tests.conftest import running_server
from tests.unit.stray_writer import storage, tensor

MODEL = Identity({"content": "bytes"})
MIB = 2**20

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("driver")]

STRAY = """
import sys
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
from gms_core.protocol.messages import Export
from gms_core.vmm.driver import Access, Address

with connect(socket_path=Path(sys.argv[1]), client="stray") as session:
    lease = session.acquire("weights", "ro", Identity({"content": "bytes"}), timeout_s=10)
    offsets = {one.id: one.offset for one in lease.layout.allocations}
    driver = session.driver
    base = driver.reserve(lease.layout.extent)

    def take(received):
        for item in received:
            address = Address(base + offsets[item.id])
            driver.map(address, item.size, driver.import_descriptor(item.descriptor, item.size))
            driver.set_access(address, item.size, Access.READ_WRITE)

    session.receive_allocations(Export("weights"), take)
    print("mapped", flush=True)
    for line in sys.stdin:
        address = Address(base + int(line))
        driver.write(address, bytes([driver.read(address, 1)[0] ^ 1]))
        print("written", flush=True)
"""


def test_tensor_is_named_when_another_process_writes_one_byte_of_it(runtime_dir) -> None:
    manifest = encode(
        (
            storage(0, 3 * MIB, tensor("embed.weight", "head.weight", elements=3 * MIB // 4)),
            storage(4 * MIB, 9 * MIB, tensor("proj.weight", elements=9 * MIB // 2, dtype="bfloat16")),
        )
    )
    with running_server(runtime_dir, list_gpus()[0].id) as server, server.connect() as publisher, server.connect() as session:
        slab = 2 * publisher.welcome.granularity
        write = publisher.acquire("weights", "rw", MODEL, timeout_s=10, slab_bytes=slab)
        assert isinstance(write, WriteLease)
        write.arena.allocate(16 * MIB)
        publisher.driver.write(write.arena.address(0), b"\x01" * (16 * MIB))
        with write.commit(manifest, MODEL), Audited(session, "weights", MODEL) as audited:
            assert (audited.look().complete, audited.look().changes) == (True, ())
            command = [sys.executable, "-c", STRAY, str(server.socket)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stray:
                try:
                    assert stray.stdin is not None
                    assert stray.stdout is not None
                    assert stray.stdout.readline() == "mapped\n"
                    assert audited.look().changes == ()
                    for offset, names in ((1, ("embed.weight", "head.weight")), (13 * MIB - 1, ("proj.weight",)), (14 * MIB, None)):
                        stray.stdin.write(f"{offset}\n")
                        stray.stdin.flush()
                        assert stray.stdout.readline() == "written\n"
                        look = audited.look()
                        assert (look.complete, look.error) == (True, None)
                        (change,) = look.changes
                        assert [one.names for one in change.tensors] == ([names] if names else [])
                        assert change.first == change.last
                        assert change.first.offset <= offset < change.first.end
                        assert change.size <= audited.chunk
                    assert audited.look().changes == ()
                finally:
                    stray.kill()
