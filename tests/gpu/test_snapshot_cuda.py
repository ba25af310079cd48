"""Transfers between files and the memory of a real GPU: lanes, pinned buffers, round trips on every backend, and how fast they are."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from gms_core.devices import list_gpus
from gms_core.errors import DriverError, SnapshotDamaged, TransferCancelled
from gms_core.snapshot import registry
from gms_core.snapshot.buffers import Ring, populate
from gms_core.snapshot.memories import ArenaMemory, memory_for
from gms_core.vmm.driver import Access, Address
from tests.unit.snapshot_transfers import Scene, transfer_threads, usable_backends

pytestmark = pytest.mark.gpu

MIB, GIB = 2**20, 2**30
GAPS = ((0, 2 * MIB), (2 * MIB, 4 * MIB), (10 * MIB, 2 * MIB))
DEVICE_BYTES = 4 * GIB
"""Of the restore that is timed."""


@contextlib.contextmanager
def device_memory(driver, allocations) -> Iterator[Address]:
    """Zeroed allocations of the device at their offsets, as an arena has them."""
    extent = max(place + size for place, size in allocations)
    base = driver.reserve(extent)
    handles = []
    for place, size in allocations:
        handle = driver.create(size)
        handles.append(handle)
        driver.map(Address(base + place), size, handle)
        driver.set_access(Address(base + place), size, Access.READ_WRITE)
        if size <= 64 * MIB:
            driver.write(Address(base + place), bytes(size))
    try:
        yield base
    finally:
        driver.synchronize()
        for (place, size), handle in zip(allocations, handles, strict=True):
            driver.unmap(Address(base + place), size)
            driver.release(handle)
        driver.free_reservation(base, extent)


def held(driver, base, allocations):
    return b"".join(driver.read(Address(base + place), size) for place, size in allocations)


def fill(driver, base, scene):
    begin = 0
    for place, size in scene.allocations:
        driver.write(Address(base + place), scene.data[begin : begin + size])
        begin += size


@pytest.mark.parametrize("folder", ["", "/dev/shm"], ids=["disk", "memory"])
@pytest.mark.parametrize("name", usable_backends(gpu=True))
def test_device_memory_is_the_same_when_it_was_saved_and_restored(driver, tmp_path, name, folder):
    if folder and name.endswith("-gds"):
        pytest.skip("needs a file system that GPUDirect Storage reads, and a tmpfs is none")
    with tempfile.TemporaryDirectory(dir=folder or tmp_path) as place, device_memory(driver, GAPS) as source, device_memory(driver, GAPS) as target:
        scene = Scene(Path(place), allocations=GAPS, block_pages=256)
        fill(driver, source, scene)
        saving = name if "save" in registry.find(name).directions else "staged"
        with memory_for(driver.device_id, GAPS) as memory:
            memory.ready(source)
            saved = registry.find(saving).open(scene.job("save", chunk_bytes=str(MIB // 2)), memory).finish()
        assert [saved.checksums[number] for number in range(len(scene.pieces))] == scene.checksums
        assert scene.files_hold_image()
        with memory_for(driver.device_id, GAPS) as memory:
            transfer = registry.find(name).open(scene.job(chunk_bytes=str(MIB // 2)), memory)
            memory.ready(target)
            restored = transfer.finish()
        assert held(driver, target, GAPS) == scene.data
        assert restored.checksums == saved.checksums
        assert not any("could not be pinned" in note for note in (*saved.notes, *restored.notes))


@pytest.mark.parametrize("name", usable_backends(gpu=True))
def test_file_and_position_are_named_when_a_block_has_a_wrong_bit(driver, tmp_path, name):
    scene = Scene(tmp_path, allocations=GAPS, block_pages=256)
    scene.fill_files()
    scene.flip(scene.pieces[5])
    with device_memory(driver, GAPS) as target, memory_for(driver.device_id, GAPS) as memory:
        memory.ready(target)
        with pytest.raises(SnapshotDamaged) as caught:
            registry.find(name).open(scene.job(chunk_bytes=str(MIB)), memory).finish()
        assert caught.value.details["position"] == str(scene.pieces[5].position)
    assert transfer_threads() == []


def test_context_stays_usable_when_memory_never_comes(driver, tmp_path):
    scene = Scene(tmp_path, allocations=GAPS, block_pages=256)
    scene.fill_files()
    with memory_for(driver.device_id, GAPS) as memory:
        transfer = registry.find("staged").open(scene.job(), memory)
        memory.never()
        with pytest.raises(TransferCancelled):
            transfer.finish()
    driver.synchronize()


def test_host_memory_is_pinned_until_it_is_given_up_when_it_is_registered(driver):
    from gms_core.vmm.cuda_calls import checked  # needs the bindings, which a machine that only collects the tests has not

    ring = Ring(2, 2 * MIB)
    context = checked("cuDevicePrimaryCtxRetain", driver._device)
    with memory_for(driver.device_id, GAPS) as memory:
        memory.register(ring.address, ring.size)
        checked("cuCtxPushCurrent", context)
        try:
            assert int(checked("cuMemHostGetFlags", ring.address)) & 1
            memory.unregister(ring.address)
            with pytest.raises(DriverError):
                checked("cuMemHostGetFlags", ring.address)
        finally:
            checked("cuCtxPopCurrent")
            checked("cuDevicePrimaryCtxRelease", driver._device)
    ring.close()


def test_copies_of_a_lane_are_whole_when_they_are_waited_for_in_any_order(driver):
    data = os.urandom(2 * MIB)
    ring = Ring(4, 2 * MIB)
    with device_memory(driver, GAPS) as base, memory_for(driver.device_id, GAPS) as memory:
        memory.register(ring.address, ring.size)
        memory.ready(base)
        lane = memory.lane()
        for number, buffer in enumerate(ring.buffers):
            buffer.view[:] = bytes([number]) + data[1:]
        there = [lane.to_memory(number * 2 * MIB, buffer.address, 2 * MIB) for number, buffer in enumerate(ring.buffers)]
        for ticket in reversed(there):
            lane.wait(ticket)
            lane.wait(ticket)
        assert [held(driver, base, GAPS)[number * 2 * MIB :][:4] for number in range(4)] == [bytes([number]) + data[1:4] for number in range(4)]
        for buffer in ring.buffers:
            buffer.view[:] = bytes(2 * MIB)
        back = [lane.from_memory(buffer.address, number * 2 * MIB, 2 * MIB) for number, buffer in enumerate(ring.buffers)]
        for ticket in back[:2]:
            lane.wait(ticket)
        lane.close()  # which waits for the others
        lane.close()
        assert all(bytes(buffer.view) == bytes([number]) + data[1:] for number, buffer in enumerate(ring.buffers))
        memory.unregister(ring.address)
    ring.close()


@pytest.mark.parametrize("size", [64 * 2**10, 192 * 2**10, MIB, 15 * MIB + 64 * 2**10, 16 * MIB])
def test_device_finds_the_checksum_of_its_memory_when_a_block_has_any_size(driver, size):
    data = os.urandom(16 * MIB)
    with device_memory(driver, ((0, 16 * MIB),)) as base, memory_for(driver.device_id, ((0, 16 * MIB),)) as memory:
        driver.write(base, data)
        memory.ready(base)
        memory.prepare_hash(16 * MIB)
        with contextlib.closing(memory.lane()) as lane:
            lane.arrive()
            hashed = lane.hash()
            assert hashed is not None
            blocks = [(offset, size) for offset in (0, 16 * MIB - size)] * (hashed.at_once // 2)
            tickets = [hashed.begin(blocks[:count]) for count in range(1, hashed.at_once + 1)]
            right = [xxhash.xxh3_64_intdigest(data[offset : offset + size]) for offset, _ in blocks]
            assert [hashed.end(ticket) for ticket in tickets] == [right[:count] for count in range(1, hashed.at_once + 1)]


def test_device_finds_the_checksum_of_a_block_when_it_lies_in_parts_and_has_just_been_copied(driver):
    allocations = tuple((number * 4 * MIB, 2 * MIB) for number in range(8))
    ring = Ring(1, 16 * MIB)
    with device_memory(driver, allocations) as base, memory_for(driver.device_id, allocations) as memory:
        memory.register(ring.address, ring.size)
        memory.ready(base)
        memory.prepare_hash(16 * MIB)
        with contextlib.closing(memory.lane()) as lane:
            lane.arrive()
            hashed = lane.hash()
            for _ in range(4):
                ring.buffers[0].view[:] = data = os.urandom(16 * MIB)
                lane.to_memory(0, ring.address, 16 * MIB)
                assert hashed.end(hashed.begin([(0, 16 * MIB)])) == [xxhash.xxh3_64_intdigest(data)]
        memory.unregister(ring.address)
    ring.close()


def test_host_finds_checksums_when_a_block_lies_in_too_many_parts(driver):
    allocations = tuple((number * 4 * MIB, 2 * MIB) for number in range(8))
    with device_memory(driver, allocations) as base, memory_for(driver.device_id, allocations) as memory:
        memory.ready(base)
        memory.prepare_hash(64 * MIB)
        with contextlib.closing(memory.lane()) as lane:
            lane.arrive()
            assert lane.hash() is None


def test_no_context_is_left_when_memory_is_closed():
    script = """
import sys
from gms_core.snapshot.memories import ArenaMemory, memory_for
from gms_core.vmm.cuda_calls import checked, find_device
with memory_for(sys.argv[1], ((0, 2**21),)) as memory:
    memory.lane().close()
print(checked("cuDevicePrimaryCtxGetState", find_device(sys.argv[1]))[1])
"""
    command = [sys.executable, "-c", script, list_gpus()[0].id]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "0"


def pinned_gib_s(memory: ArenaMemory) -> float:
    """What one large copy from pinned memory reaches: the limit of every restore."""
    ring = Ring(1, GIB)
    populate(ring.buffers)
    memory.register(ring.address, ring.size)
    lane = memory.lane()
    best = 0.0
    for _ in range(4):
        begin = time.perf_counter()
        lane.wait(lane.to_memory(0, ring.address, GIB))
        best = max(best, 1 / (time.perf_counter() - begin))
    lane.close()
    memory.unregister(ring.address)
    ring.close()
    return best


def test_speed_is_told_beside_that_of_one_pinned_copy_when_files_are_in_memory(driver, capsys):
    allocations = ((0, DEVICE_BYTES),)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place, device_memory(driver, allocations) as base:
        scene = Scene(Path(place), allocations=allocations, block_pages=4096, stripe_blocks=4)
        scene.fill_files()
        with memory_for(driver.device_id, allocations) as memory:
            memory.ready(base)
            lines = [f"one pinned copy of 1 GiB: {pinned_gib_s(memory):.1f} GiB/s"]
        for name in [name for name in usable_backends(gpu=True) if not name.endswith("-gds")]:
            for hashed, workers in itertools.product(("auto", "host"), (8, 16)):
                with memory_for(driver.device_id, allocations) as memory:
                    memory.ready(base)
                    moved = registry.find(name).open(scene.without(options={"hash": hashed}, workers=workers), memory).finish()
                phases = ", ".join(f"{phase.name} {phase.seconds:.2f}" for phase in moved.phases)
                told = f"{moved.bytes / GIB / moved.seconds:.1f} GiB/s ({phases}) {' '.join(moved.notes)}"
                lines.append(f"{name} with {workers} threads, hash={hashed}: {told}")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))
    assert moved.bytes == DEVICE_BYTES
