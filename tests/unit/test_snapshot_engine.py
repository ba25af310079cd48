"""The engine of transfers: every byte arrives, the first error ends all, and nothing is left when a job ends early."""

import functools
import gc
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gms_core.errors import DriverError, InvalidArgument, SnapshotDamaged, TransferCancelled, TransferFailed
from gms_core.snapshot import registry
from gms_core.snapshot.engine import dedicate_process
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.memories import DiscardingMemory, memory_for
from gms_core.snapshot.plan import Piece
from tests.unit.snapshot_transfers import HashingMemory, LateMemory, Memory, Scene, descriptors, rings, transfer_threads

STAGED = registry.find("staged")


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread, no descriptor and no buffer is left, however a transfer has ended."""
    gc.collect()
    before = descriptors(), rings()
    yield
    assert transfer_threads() == []
    assert (descriptors(), rings()) == before


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def _wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


pages = st.integers(1, 12)


@given(st.data())
@examples(max_examples=40)
def test_every_byte_arrives_and_returns_when_layout_and_tuning_are_any(data):
    place, allocations = 0, []
    for gap, size in data.draw(st.lists(st.tuples(st.integers(0, 2), pages), min_size=1, max_size=5), "gaps and sizes, pages"):
        place += gap * PAGE_BYTES
        allocations.append((place, size * PAGE_BYTES))
        place += size * PAGE_BYTES
    roots, block, stripe = data.draw(st.integers(1, 3), "roots"), data.draw(pages, "block"), data.draw(st.integers(1, 3), "blocks of a stripe")
    name = data.draw(st.sampled_from(["staged", "aio"]), "backend")
    options = {"chunk_bytes": str(data.draw(pages, "chunk") * PAGE_BYTES), "workers": data.draw(st.integers(0, 5), "workers")}
    depth = data.draw(st.integers(1, 4), "depth") if name == "aio" else 1
    options |= {"depth": str(depth)} if name == "aio" else {}
    options["buffers"] = str(depth + data.draw(st.integers(0, 2), "spare buffers"))
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), roots, allocations, block, stripe)
        memory_of = data.draw(st.sampled_from([memory_for, LateMemory, HashingMemory]), "memory")
        saved = scene.save(name, memory_of, **options)
        assert [saved.checksums[number] for number in range(len(scene.pieces))] == scene.checksums
        assert saved.bytes == scene.size
        assert scene.files_hold_image()
        target, restored = scene.restore(name, memory_of, **options)
        assert target.bytes[:] == scene.filled().bytes[:]
        assert restored.checksums == saved.checksums
        assert restored.bytes == scene.size


def test_files_are_read_when_the_memory_is_not_there_yet(scene, monkeypatch):
    read = threading.Event()
    from gms_core.snapshot.files import ShardFile

    plain = ShardFile.read
    monkeypatch.setattr(ShardFile, "read", lambda self, view, position: (plain(self, view, position), read.set()))
    scene.fill_files()
    target = Memory(scene.extent)
    with memory_for("host", scene.allocations) as memory:
        transfer = STAGED.open(scene.job(), memory)
        assert read.wait(30)
        assert transfer.poll() == 0
        memory.ready(target.base)
        moved = transfer.finish()
    assert transfer.poll() == moved.bytes == scene.size
    assert target.bytes[:] == scene.filled().bytes[:]
    assert {phase.name for phase in moved.phases} >= {"read", "copy", "hash", "wait", "clean"}
    assert moved.seconds > 0


def test_transfer_ends_when_its_memory_never_comes(scene):
    scene.fill_files()
    with memory_for("host", scene.allocations) as memory:
        transfer = STAGED.open(scene.job(), memory)
        memory.never()
        with pytest.raises(TransferCancelled):
            transfer.finish()


def test_transfer_ends_when_it_is_cancelled_before_its_memory_is_there(scene):
    scene.fill_files()
    with memory_for("host", scene.allocations) as memory:
        transfer = STAGED.open(scene.job(), memory)
        transfer.cancel()
        transfer.cancel()
        for _ in range(2):
            with pytest.raises(TransferCancelled, match="was cancelled"):
                transfer.finish()
        assert transfer.poll() == 0


def test_nothing_is_written_to_memory_when_it_comes_after_the_cancel(scene):
    scene.fill_files()
    target = Memory(scene.extent)
    with memory_for("host", scene.allocations) as memory:
        transfer = STAGED.open(scene.job(), memory)
        transfer.cancel()
        memory.ready(target.base)
        with pytest.raises(TransferCancelled):
            transfer.finish()
    assert target.bytes[:] == bytes(scene.extent)


def test_cancel_changes_nothing_when_all_has_arrived(scene):
    scene.fill_files()
    target = Memory(scene.extent)
    with memory_for("host", scene.allocations) as memory:
        memory.ready(target.base)
        transfer = STAGED.open(scene.job(), memory)
        first = transfer.finish()
        transfer.cancel()
        assert transfer.finish() == first


def test_everything_is_given_up_when_nobody_waits_for_a_cancelled_transfer(scene):
    scene.fill_files()
    with memory_for("host", scene.allocations) as memory:
        STAGED.open(scene.job(), memory).cancel()
        _wait_until(lambda: not transfer_threads())


def test_other_threads_stop_when_one_fails(scene, monkeypatch):
    from gms_core.snapshot.files import ShardFile

    def read(self, view, position):
        if self.path == scene.files[1].path:
            raise self.failed(position, OSError(5, "broken"))

    monkeypatch.setattr(ShardFile, "read", read)
    with memory_for("host", scene.allocations) as memory:  # which never comes: the threads that could read wait for it
        transfer = STAGED.open(scene.job(workers=4), memory)
        with pytest.raises(TransferFailed, match="cannot be read") as caught:
            transfer.finish()
    assert caught.value.code == "transfer_failed"
    assert caught.value.details["file"] == str(scene.files[1].path)


def test_interrupt_is_raised_when_nothing_is_under_way_any_more(scene):
    scene.fill_files()
    main, copying, told, go_on = threading.main_thread().ident, threading.Event(), threading.Event(), threading.Event()

    class Held(LateMemory):
        def lane(self, *, spin=False):
            lane = super().lane(spin=spin)
            plain = lane.wait

            def wait(ticket):
                copying.set()
                assert go_on.wait(30)
                plain(ticket)

            lane.wait, lane.abandon = wait, told.set
            return lane

    def interrupt():
        def is_waiting():
            frame, names = sys._current_frames()[main], []
            while frame:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            return names[0] == "wait" and {"_join", "finish"} <= set(names)

        try:
            assert copying.wait(30)
            _wait_until(is_waiting)
            signal.pthread_kill(main, signal.SIGINT)
            assert told.wait(30)
            _wait_until(is_waiting)  # again: for copies that go on
        finally:
            go_on.set()

    interrupter, target = threading.Thread(target=interrupt), Memory(scene.extent)
    with Held("host", scene.allocations) as memory:
        memory.ready(target.base)
        transfer = STAGED.open(scene.job(), memory)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            transfer.finish()
        assert go_on.is_set()
        assert not any(copy for lane in memory.lanes for pending in lane.copies for copy in pending)
    interrupter.join()


def test_nothing_is_under_way_when_an_interrupt_comes_while_threads_are_started(scene, monkeypatch):
    scene.fill_files()
    start, started = threading.Thread.start, []

    def interrupted(thread):
        started.append(thread)
        if len(started) == 3:
            start(thread)
            raise KeyboardInterrupt
        if len(started) < 3:
            start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    target = Memory(scene.extent)
    with memory_for("host", scene.allocations) as memory:
        memory.ready(target.base)
        with pytest.raises(KeyboardInterrupt):
            STAGED.open(scene.job(workers=4), memory)
    _wait_until(lambda: not transfer_threads())  # the third was never told to whoever started it; it ends without touching anything


def test_program_exits_when_a_transfer_was_forgotten(scene):
    scene.fill_files()
    script = f"""
from pathlib import Path
from gms_core.snapshot import registry
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.transfer import File, Job
file = File(Path({str(scene.files[0].path)!r}), "a", {scene.files[0].size})
registry.find("staged").open(Job("restore", [file], [Piece(0, 0, 4096, 0, 0)], [0], 4096), memory_for("host", ((0, 4096),)))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_job_fails_in_words_when_threads_cannot_be_started(scene, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with memory_for("host", scene.allocations) as memory:
        transfer = STAGED.open(scene.job(workers=4), memory)
        with pytest.raises(TransferFailed, match="thread 3 of 4 cannot be started") as caught:
            transfer.finish()
    assert "fewer threads" in caught.value.hint


def test_job_without_blocks_moves_nothing(scene):
    with memory_for("host", scene.allocations) as memory:
        memory.ready(Memory(scene.extent).base)
        moved = STAGED.open(scene.without(pieces=[]), memory).finish()
    assert (moved.bytes, moved.checksums) == (0, {})


def test_only_the_blocks_of_the_job_are_moved_when_others_are_there_already(scene):
    filled, some = scene.filled(), scene.pieces[1::3]
    with memory_for("host", scene.allocations) as memory:
        memory.ready(filled.base)
        job = scene.without(direction="save", pieces=some, checksums=())
        moved = STAGED.open(job, memory).finish()
    assert moved.checksums == {piece.block: scene.checksums[piece.block] for piece in some}
    for piece in scene.pieces:
        written = scene.files[piece.shard].path.read_bytes()[piece.position :][: piece.size]
        assert written == (scene.data[piece.offset :][: piece.size] if piece in some else bytes(piece.size))


def test_buffers_are_pinned_once_and_freed_after_the_copies_when_memory_is_a_device(scene):
    filled = scene.filled()
    with LateMemory("host", scene.allocations) as memory:
        memory.ready(filled.base)
        STAGED.open(scene.job("save", workers=3), memory).finish()
    ((address, size, writable),) = memory.registered
    assert memory.unregistered == [address]
    assert size % (2 * 2**20) == 0
    assert writable


def test_copies_are_made_and_it_is_told_when_buffers_cannot_be_pinned(scene):
    def memory_of(device, allocations):
        memory = LateMemory(device, allocations)
        memory.refuse = lambda writable: DriverError("no page can be locked")
        return memory

    saved = scene.save(memory_of=memory_of)
    target, restored = scene.restore(memory_of=memory_of)
    assert target.bytes[:] == scene.filled().bytes[:]
    assert all(any("no page can be locked" in note for note in moved.notes) for moved in (saved, restored))


def test_buffers_stay_when_a_device_does_not_say_that_its_copies_have_ended(scene):
    class Lost(LateMemory):
        def lane(self, *, spin=False):
            lane = super().lane(spin=spin)
            lane.close = functools.partial(self.fail)
            return lane

        def fail(self):
            raise DriverError("the context is lost")

    before = rings()
    filled = scene.filled()
    with Lost("host", scene.allocations) as memory:
        memory.ready(filled.base)
        transfer = STAGED.open(scene.job("save"), memory)
        with pytest.raises(DriverError, match="context is lost"):
            transfer.finish()
    assert memory.unregistered == []
    (left,) = rings() - before
    _unmap(left, memory.registered[0][1])


def _unmap(address, size):
    import ctypes

    libc = ctypes.CDLL(None)
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


def test_all_is_checked_when_memory_discards(scene):
    scene.fill_files()
    with DiscardingMemory() as memory:
        moved = STAGED.open(scene.job(), memory).finish()
        assert moved.bytes == scene.size
        scene.flip(scene.pieces[4])
        with pytest.raises(SnapshotDamaged):
            STAGED.open(scene.job(), memory).finish()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": "red"}, "no option 'colour'"),
        ({"depth": "2"}, "no option 'depth'"),
        ({"chunk_bytes": "100"}, "chunk_bytes='100'"),
        ({"chunk_bytes": "4097"}, "chunk_bytes=4097"),
        ({"chunk_bytes": "many"}, "chunk_bytes='many'"),
        ({"buffers": "0"}, "buffers='0'"),
        ({"direct": "maybe"}, "direct='maybe'"),
        ({"workers": -1}, "-1 threads"),
    ],
)
def test_job_is_refused_in_words_when_an_option_is_wrong(scene, options, words):
    with pytest.raises(InvalidArgument, match=words):
        STAGED.check(scene.job(**options))


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (Piece(0, 0, 4096, 7, 0), "lies in no file"),
        (Piece(0, 0, 4096, 0, 2**30), "lies in no file"),
        (Piece(0, 0, 4095, 0, 0), "not a block of whole pages"),
        (Piece(0, 0, 4096, 0, 1), "not a block of whole pages"),
        (Piece(0, 0, 5 * 4096, 0, 0), "not a block of whole pages"),
        (Piece(999, 0, 4096, 0, 0), "has no checksum"),
    ],
)
def test_job_is_refused_in_words_when_a_block_cannot_be(scene, piece, words):
    with pytest.raises(InvalidArgument, match=words):
        STAGED.check(scene.without(pieces=[piece]))


def test_threads_change_sooner_when_a_process_is_dedicated():
    before = sys.getswitchinterval()
    try:
        dedicate_process()
        assert sys.getswitchinterval() < before
    finally:
        sys.setswitchinterval(before)
