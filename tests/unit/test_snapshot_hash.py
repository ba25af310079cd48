"""Checksums that a device finds, as the engine uses them. The device is a fake, whose copies are late; tests/gpu has the kernel itself."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

import pytest
import xxhash
from snapshot_transfers import HashingMemory, LateMemory, Scene, usable_backends

from gms_core.errors import InvalidArgument, SnapshotDamaged, TransferFailed
from gms_core.snapshot import kernels, registry
from gms_core.snapshot.device_checks import DeviceChecks


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    made.fill_files()
    return made


def restored(scene, memory, **options):
    """Restore into such a memory; what was moved, and the memory."""
    kept = []

    def memory_of(device, allocations):
        kept.append(memory(device, allocations))
        return kept[0]

    target, moved = scene.restore(memory_of=memory_of, **options)
    return target, moved, kept[0]


def hashed_blocks(memory):
    """That its lanes have hashed."""
    return sum(count for lane in memory.lanes for count, _, _ in lane.hashed)


DEEP = [name for name in ("aio", "uring") if name in usable_backends()]


@pytest.mark.parametrize(("name", "depth"), [("staged", {}), *((name, {"depth": depth}) for name in DEEP for depth in ("1", "3", "12"))])
@pytest.mark.parametrize("chunk_pages", [1, 3, 4])
def test_host_hashes_nothing_when_the_device_can(scene, name, depth, chunk_pages, monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.worker.Worker._digest", lambda *_: pytest.fail("the host has hashed"))
    target, moved, memory = restored(scene, HashingMemory, name=name, workers=1, chunk_bytes=str(chunk_pages * 4096), **depth)
    assert scene.holds(target)
    assert [moved.checksums[number] for number in range(len(scene.pieces))] == scene.checksums
    assert hashed_blocks(memory) == len(scene.pieces)


@pytest.mark.parametrize("memory", [LateMemory, HashingMemory])
def test_host_hashes_when_the_device_cannot_or_shall_not(scene, memory):
    target, moved, used = restored(scene, memory, hash="host")
    assert scene.holds(target)
    assert moved.checksums[0] == scene.checksums[0]
    assert hashed_blocks(used) == 0


@pytest.mark.parametrize("name", ["staged", *DEEP])
@pytest.mark.parametrize("number", [0, 5, -1])
def test_file_is_named_when_the_device_finds_that_a_block_has_changed(scene, name, number):
    piece = scene.pieces[number]
    scene.flip(piece)
    with pytest.raises(SnapshotDamaged) as caught:
        restored(scene, HashingMemory, name=name, workers=1)
    assert caught.value.details == {"file": str(scene.files[piece.shard].path), "position": str(piece.position)}


class LateHashing(HashingMemory):
    """As a GPU whose driver compiles for a while."""

    ready_after = 7


class TooLateHashing(HashingMemory):
    """As one whose driver compiles longer than copies take."""

    ready_after = 10**9


class NeverHashing(HashingMemory):
    """As one whose driver cannot compile the kernel."""

    refuses_after = 0


class LateRefusing(LateHashing):
    """As one whose driver compiles for a while, and then cannot."""

    refuses_after = 0


SLOW = [LateHashing, TooLateHashing, NeverHashing, LateRefusing]


@pytest.mark.parametrize("memory", SLOW)
@pytest.mark.parametrize("name", ["staged", *DEEP])
@pytest.mark.parametrize("chunk_pages", [1, 4])
def test_every_block_is_compared_when_the_device_can_hash_only_later_or_never(scene, name, memory, chunk_pages):
    target, moved, used = restored(scene, memory, name=name, workers=1, chunk_bytes=str(chunk_pages * 4096))
    assert scene.holds(target)
    assert [moved.checksums[number] for number in range(len(scene.pieces))] == scene.checksums
    refuses = memory.refuses_after is not None
    assert hashed_blocks(used) == (0 if refuses else len(scene.pieces))
    assert any("the host has" in note for note in moved.notes) is refuses


@pytest.mark.parametrize("memory", SLOW)
@pytest.mark.parametrize("number", [0, 5, -1])
def test_file_is_named_when_a_block_has_changed_and_the_device_can_hash_only_later_or_never(scene, memory, number):
    piece = scene.pieces[number]
    scene.flip(piece)
    with pytest.raises(SnapshotDamaged) as caught:
        restored(scene, memory, workers=1)
    assert caught.value.details == {"file": str(scene.files[piece.shard].path), "position": str(piece.position)}


@pytest.mark.parametrize("memory", [HashingMemory, LateHashing, TooLateHashing])
def test_blocks_are_hashed_several_at_once_while_copies_go_on(scene, memory):
    _, _, used = restored(scene, memory, workers=1, chunk_bytes=str(scene.block))
    (lane,) = used.lanes
    sizes, begun, under_way = zip(*lane.hashed, strict=True)
    assert set(sizes[:-1]) == {3}
    assert min(begun) >= min(memory.ready_after, len(scene.pieces)), "nothing waits for the device while there is something to copy"
    if memory is not TooLateHashing:
        assert begun[0] == max(3, memory.ready_after), "nor is it put off"
    assert max(under_way) == 2, "and a batch is compared while the next one is hashed"


def test_host_hashes_the_rest_when_the_device_has_refused(scene, monkeypatch):
    read_back = []
    original = DeviceChecks._read_back
    monkeypatch.setattr(DeviceChecks, "_read_back", lambda self, piece: read_back.append(piece) or original(self, piece))
    target, moved, _ = restored(scene, NeverHashing, workers=1)
    assert scene.holds(target)
    assert len(moved.checksums) == len(scene.pieces)
    assert len(read_back) == 3, "only those that were copied before it had"


@pytest.mark.parametrize("memory", [HashingMemory, NeverHashing])
def test_file_is_not_blamed_when_bytes_have_changed_on_the_way(scene, memory):
    class Changing(memory):
        changes = True

    with pytest.raises(TransferFailed, match="changed on the way") as caught:
        restored(scene, Changing)
    assert caught.value.details["file"] in {str(file.path) for file in scene.files}


def test_damage_is_told_when_the_block_cannot_be_read_again(scene, monkeypatch):
    piece = scene.pieces[3]
    scene.flip(piece)

    def gone(*_):
        raise TransferFailed("it is gone")

    monkeypatch.setattr("gms_core.snapshot.device_checks._read_again", gone)
    with pytest.raises(SnapshotDamaged, match=f"{scene.checksums[3]:016x}") as caught:
        restored(scene, HashingMemory)
    assert caught.value.details == {"file": str(scene.files[piece.shard].path), "position": str(piece.position)}


def test_option_is_refused_when_it_is_no_such_word(scene):
    with pytest.raises(InvalidArgument, match="hash='device' is neither of auto, host"):
        registry.find("staged").check(scene.job(hash="device"))


def test_kernel_is_the_one_of_its_source():
    folder = files("gms_core.snapshot.kernels")
    source, ptx = folder.joinpath("xxh3.cu").read_bytes(), folder.joinpath("xxh3.ptx").read_text()
    assert hashlib.sha256(source).hexdigest() in ptx.splitlines()[0], "make kernels"


def test_limits_are_those_of_the_kernel():
    source = files("gms_core.snapshot.kernels").joinpath("xxh3.cu").read_text()
    told = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", source)}
    assert told["BLOCKS"] == kernels.MOST_BLOCKS
    assert told["RANGES"] == kernels.MOST_RANGES
    assert told["PIECES"] * told["PIECE"] == kernels.TILE_BYTES
    assert 32 * (told["WARPS"] + 1) == kernels.THREADS


def test_constants_of_the_kernel_are_those_of_the_hash():
    """Its steps, with the constants that stand in its source, in slow Python."""
    source = files("gms_core.snapshot.kernels").joinpath("xxh3.cu").read_text()

    def table(name):
        words = source.split(f" {name}[", 1)[1].split("{", 1)[1].split("}", 1)[0]
        return [int(word.strip().removesuffix("ull"), 16) for word in words.split(",") if word.strip()]

    secret, last, merge, start = (table(name) for name in ("SECRET", "LAST", "MERGE", "START"))
    assert _xxh3(bytes(range(256)) * 12, secret, last, merge, start) == xxhash.xxh3_64_intdigest(bytes(range(256)) * 12)


def _xxh3(data, secret, last, merge, start):
    mask, sums, pieces = 2**64 - 1, list(start), len(data) // 1024
    for piece in range(pieces):
        for stripe in range(16):
            keys = last if piece == pieces - 1 and stripe == 15 else secret[stripe : stripe + 8]
            for lane in range(8):
                value = int.from_bytes(data[1024 * piece + 64 * stripe + 8 * lane :][:8], "little")
                mixed = value ^ keys[lane]
                sums[lane ^ 1] = sums[lane ^ 1] + value & mask
                sums[lane] = sums[lane] + (mixed & 0xFFFFFFFF) * (mixed >> 32) & mask
        if piece < pieces - 1:
            sums = [(one ^ one >> 47 ^ secret[16 + lane]) * 0x9E3779B1 & mask for lane, one in enumerate(sums)]
    found = len(data) * 0x9E3779B185EBCA87 & mask
    for lane in range(0, 8, 2):
        product = (sums[lane] ^ merge[lane]) * (sums[lane + 1] ^ merge[lane + 1])
        found = found + (product & mask ^ product >> 64) & mask
    found = (found ^ found >> 37) * 0x165667919E3779F9 & mask
    return found ^ found >> 32
