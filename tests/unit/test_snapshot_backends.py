"""Each transfer backend that this machine can run: round trips, and what is said when a file or a disk is not as it should be."""

import errno
import fcntl
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gms_core.errors import BackendUnavailable, DriverError, InvalidArgument, SnapshotDamaged, TransferCancelled, TransferFailed
from gms_core.snapshot import registry, system_calls
from gms_core.snapshot.backends.deep import DeepChannel
from gms_core.snapshot.buffers import Ring
from gms_core.snapshot.chunks import Chunk
from gms_core.snapshot.files import ShardFile
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.plan import Piece
from gms_core.snapshot.running import running
from gms_core.snapshot.transfer import File, Job
from tests.unit.snapshot_transfers import HashingMemory, LateMemory, Memory, Scene, descriptors, rings, transfer_threads, usable_backends

BACKENDS = usable_backends()
WRITERS = [name for name in BACKENDS if "save" in registry.find(name).directions]
THROUGH_PREADV = ["staged"]


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread, no descriptor and no mapping is left, however a transfer has ended."""
    before = descriptors(), rings()
    yield
    assert transfer_threads() == []
    assert (descriptors(), rings()) == before


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def _maps():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if ".shard" in line]


def test_plain_reads_can_be_used_when_nothing_else_can():
    assert {"staged", "local-ssd-pinned"} <= set(BACKENDS)


def test_library_is_there_when_the_tests_of_its_backends_are_to_run():
    assert {"nixl-posix", "nixl-posix-direct"} <= set(BACKENDS), f"make environment installs NIXL: {registry.find('nixl-posix').probe().reason}"


@pytest.mark.parametrize("folder", ["", "/dev/shm"], ids=["disk", "memory"])
@pytest.mark.parametrize("name", BACKENDS)
def test_image_is_the_same_when_it_was_saved_and_restored(tmp_path, name, folder):
    with tempfile.TemporaryDirectory(dir=folder or tmp_path) as place:
        scene = Scene(Path(place), roots=3)
        if name in WRITERS:
            saved = scene.save(name, LateMemory)
            assert [saved.checksums[number] for number in range(len(scene.pieces))] == scene.checksums
            assert scene.files_hold_image()
        scene.fill_files()
        for memory_of in (memory_for, LateMemory, HashingMemory):
            target, restored = scene.restore(name, memory_of)
            assert target.bytes[:] == scene.filled().bytes[:]
            assert restored.bytes == scene.size
        assert not _maps()


@pytest.mark.parametrize("name", BACKENDS)
def test_file_and_position_are_named_when_any_block_has_a_wrong_bit(scene, name):
    scene.fill_files()
    for piece in scene.pieces:
        scene.flip(piece)
        with pytest.raises(SnapshotDamaged) as caught:
            scene.restore(name, HashingMemory if piece.block % 2 else memory_for)
        assert caught.value.details == {"file": str(scene.files[piece.shard].path), "position": str(piece.position)}
        assert f"{scene.checksums[piece.block]:016x}" in caught.value.message
        scene.flip(piece)
    scene.restore(name)


@pytest.mark.parametrize("missing", [1, PAGE_BYTES, 6 * PAGE_BYTES + 5])
@pytest.mark.parametrize("name", BACKENDS)
def test_file_is_named_when_it_is_too_short(scene, name, missing):
    scene.fill_files()
    path = scene.files[1].path
    os.truncate(path, scene.files[1].size - missing)
    with pytest.raises(SnapshotDamaged, match="ends at position") as caught:
        scene.restore(name)
    assert caught.value.details == {"file": str(path), "position": str(scene.files[1].size - missing)}


@pytest.mark.parametrize("name", BACKENDS)
def test_file_is_named_when_it_is_cut_while_it_is_read(scene, name, monkeypatch):
    scene.fill_files()
    path, end = scene.files[1].path, scene.files[1].size - 2 * PAGE_BYTES - 7
    plain = ShardFile.__init__

    def cut_later(self, *arguments, **options):
        plain(self, *arguments, **options)
        if self.path == path:
            os.truncate(path, end)

    monkeypatch.setattr(ShardFile, "__init__", cut_later)
    with pytest.raises(SnapshotDamaged, match="ends at position") as caught:
        scene.restore(name)
    assert caught.value.details == {"file": str(path), "position": str(end)}


@pytest.mark.parametrize("name", BACKENDS)
def test_file_is_named_when_it_is_not_there(scene, name):
    scene.files[0].path.unlink()
    with pytest.raises(TransferFailed, match=r"00000\.shard cannot be read.*No such file"):
        scene.restore(name)


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_told_when_files_are_written(scene, name):
    filled, files = scene.filled(), [*scene.files]
    files[1] = File(Path("/dev/full"), files[1].root, files[1].size)
    with memory_for("host", scene.allocations) as memory:
        memory.ready(filled.base)
        transfer = registry.find(name).open(scene.without(direction="save", checksums=(), files=files), memory)
        with pytest.raises(TransferFailed, match=r"/dev/full cannot be written at position .*No space left") as caught:
            transfer.finish()
    assert caught.value.details["errno"] == "ENOSPC"
    assert "Make room" in caught.value.hint


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
@pytest.mark.parametrize(("direction", "call"), [("save", "pwritev"), ("restore", "preadv")])
@pytest.mark.parametrize("name", THROUGH_PREADV)
def test_file_and_position_are_named_when_a_call_fails(scene, name, direction, call, number, monkeypatch):
    scene.fill_files()
    plain, bad = getattr(os, call), os.stat(scene.files[0].path).st_ino

    def broken(descriptor, buffers, position):
        if os.fstat(descriptor).st_ino == bad and position >= 2 * PAGE_BYTES:
            raise OSError(number, os.strerror(number))
        return plain(descriptor, buffers, position)

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(TransferFailed) as caught:
        scene.save(name) if direction == "save" else scene.restore(name)
    assert caught.value.details["file"] == str(scene.files[0].path)
    assert caught.value.details["errno"] == errno.errorcode[number]
    assert int(caught.value.details["position"]) >= 2 * PAGE_BYTES


@pytest.mark.parametrize("name", BACKENDS)
def test_page_cache_is_used_and_told_when_files_cannot_be_opened_directly(scene, name, monkeypatch):
    scene.fill_files()
    plain = os.open

    def indirect(path, flags, *arguments, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return plain(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", indirect)
    notes = [scene.restore(name)[1].notes]
    if name in WRITERS:
        notes.append(scene.save(name).notes)
    for told, verb in zip(notes, ("read", "written"), strict=False):
        assert any(note.startswith(f"2 of 2 files were {verb} through the page cache") for note in told)
    assert not any("page cache:" in note for note in scene.restore(name, direct="never")[1].notes)


@pytest.mark.parametrize(("direction", "call"), [("save", "pwritev"), ("restore", "preadv")])
def test_page_cache_is_used_and_told_when_a_call_cannot_be_direct(scene, direction, call, monkeypatch):
    scene.fill_files()
    plain = getattr(os, call)

    def indirect(descriptor, buffers, position):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not aligned")
        return plain(descriptor, buffers, position)

    monkeypatch.setattr(os, call, indirect)
    moved = scene.save(workers=4) if direction == "save" else scene.restore(workers=4)[1]
    assert moved.bytes == scene.size
    assert any(note.startswith("2 of 2 files") for note in moved.notes)


@pytest.mark.parametrize(("direction", "call"), [("save", "pwritev"), ("restore", "preadv")])
def test_every_byte_arrives_when_calls_do_only_a_part(scene, direction, call, monkeypatch):
    scene.fill_files()
    plain = getattr(os, call)
    monkeypatch.setattr(os, call, lambda descriptor, buffers, position: plain(descriptor, [buffers[0][:1000]], position))
    if direction == "save":
        scene.save()
        assert scene.files_hold_image()
    else:
        target, _ = scene.restore()
        assert target.bytes[:] == scene.filled().bytes[:]


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_left_when_a_transfer_is_cancelled_in_the_middle(name):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        _cancel_in_the_middle(Scene(Path(place), block_pages=1), name)


def _cancel_in_the_middle(scene, name):
    scene.fill_files()
    before = rings()
    began, go_on = threading.Event(), threading.Event()

    class Held(LateMemory):
        def lane(self, *, spin=False):
            lane = super().lane(spin=spin)
            plain = lane.wait

            def wait(ticket):
                began.set()  # two copies are under way: the first is waited for when a buffer is needed for the third chunk
                assert go_on.wait(30)
                plain(ticket)

            lane.wait = wait
            return lane

    target = Memory(scene.extent)
    with Held("host", scene.allocations) as memory:
        memory.ready(target.base)
        transfer = registry.find(name).open(scene.job(workers=2, buffers="4" if registry.find(name).is_deep else "2"), memory)
        assert began.wait(30)
        transfer.cancel()
        go_on.set()
        with pytest.raises(TransferCancelled):
            transfer.finish()
    assert rings() == before
    assert not _maps()
    assert sorted(memory.unregistered) == sorted(address for address, _, _ in memory.registered)


def test_saving_is_refused_when_a_backend_can_only_restore(scene):
    target = Memory(scene.extent)
    with memory_for("host", scene.allocations) as memory:
        memory.ready(target.base)
        with (
            pytest.raises(InvalidArgument, match="'local-ssd-pinned' does not save"),
            running(registry.find("local-ssd-pinned"), scene.job("save"), memory),
        ):
            pass


def test_files_are_pinned_where_they_lie_when_they_are_in_memory():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place, LateMemory("host", Scene(Path(place)).allocations) as memory:
        scene = Scene(Path(place))
        scene.fill_files()
        target = Memory(scene.extent)
        memory.ready(target.base)
        moved = registry.find("local-ssd-pinned").open(scene.job(), memory).finish()
        assert target.bytes[:] == scene.filled().bytes[:]
    assert moved.notes == ()
    assert sum(size for _, size, _ in memory.registered) == scene.size
    assert not any(writable for _, _, writable in memory.registered)
    assert sorted(memory.unregistered) == sorted(address for address, _, _ in memory.registered)


def test_buffers_are_used_and_it_is_told_when_files_cannot_be_pinned():
    def memory_of(device, allocations):
        memory = LateMemory(device, allocations)
        memory.refuse = lambda writable: None if writable else DriverError("no such pages")
        return memory

    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        scene = Scene(Path(place))
        scene.fill_files()
        target, moved = scene.restore("local-ssd-pinned", memory_of)
        assert target.bytes[:] == scene.filled().bytes[:]
    assert any("cannot be pinned where they lie: no such pages" in note for note in moved.notes)


def test_buffers_are_used_and_it_is_told_when_files_are_not_in_memory(scene, monkeypatch):
    scene.fill_files()
    for file in scene.files:
        with file.path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    target, moved = scene.restore("local-ssd-pinned")
    assert target.bytes[:] == scene.filled().bytes[:]
    assert any(f"of {scene.size} bytes were read into buffers" in note for note in moved.notes)


class Answers:
    """A queue of the kernel that answers as it is told, the last request first."""

    def __init__(self, *results):
        self.results, self.begun, self.closed = list(results), [], False

    def submit(self, buffer, size, file, position):
        result = self.results.pop(0)
        if isinstance(result, OSError):
            raise result
        if result > 0:
            result = os.preadv(file.descriptor, [buffer.view[: min(result, size)]], position)
        self.begun.append((buffer.number, result))

    def reap(self):
        return [self.begun.pop()]

    def close(self):
        assert not self.begun
        self.closed = True


@pytest.mark.parametrize(
    "results", [(8192, 8192), (5000, 4096), (-errno.EINVAL, -errno.EAGAIN), (-errno.ECANCELED, 8192), (OSError(errno.EAGAIN, ""), 8192), (1, 4097)]
)
def test_chunks_come_whole_and_in_order_when_the_kernel_answers_oddly(tmp_path, results):
    path = tmp_path / "shard"
    path.write_bytes(data := os.urandom(4 * PAGE_BYTES))
    file, ring, queue = ShardFile(File(path, "root", 4 * PAGE_BYTES), "restore", direct="never"), Ring(2, 2 * PAGE_BYTES), Answers(*results)
    channel = DeepChannel("restore", queue)
    for number, position in enumerate((0, 2 * PAGE_BYTES)):
        piece = Piece(number, position, 2 * PAGE_BYTES, 0, position)
        channel.begin(Chunk(piece, position, 2 * PAGE_BYTES, file, position), ring.buffers[number])
    for number, position in enumerate((0, 2 * PAGE_BYTES)):
        buffer = channel.end()
        assert buffer is ring.buffers[number]
        assert bytes(buffer.view[: 2 * PAGE_BYTES]) == data[position : position + 2 * PAGE_BYTES]
    channel.close()
    assert queue.closed
    file.close()
    ring.close()


@pytest.mark.parametrize("result", [-errno.EIO, OSError(errno.EIO, "")], ids=["later", "at once"])
def test_file_is_named_when_the_kernel_answers_with_an_error(tmp_path, result):
    path = tmp_path / "shard"
    path.write_bytes(bytes(2 * PAGE_BYTES))
    file, ring, queue = ShardFile(File(path, "root", 2 * PAGE_BYTES), "restore", direct="never"), Ring(2, PAGE_BYTES), Answers(PAGE_BYTES, result)
    channel = DeepChannel("restore", queue)
    chunks = [Chunk(Piece(number, 0, PAGE_BYTES, 0, 0), 0, PAGE_BYTES, file, number * PAGE_BYTES) for number in range(2)]
    channel.begin(chunks[0], ring.buffers[0])

    def second():
        channel.begin(chunks[1], ring.buffers[1])
        channel.end()
        channel.end()

    with pytest.raises(TransferFailed, match=f"{path} cannot be read at position {PAGE_BYTES}: Input/output error"):
        second()
    channel.close()
    assert queue.closed
    file.close()
    ring.close()


@pytest.mark.skipif("uring" not in BACKENDS, reason="this kernel, or the sandbox, refuses io_uring; that it says so is tested elsewhere")
def test_every_byte_arrives_and_it_is_told_when_io_uring_cannot_register_buffers(scene, monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.backends.uring._REGISTER_BUFFERS", 9999)
    scene.fill_files()
    target, moved = scene.restore("uring")
    assert target.bytes[:] == scene.filled().bytes[:]
    assert any("ulimit -l" in note for note in moved.notes)
    scene.save("uring", LateMemory)
    assert scene.files_hold_image()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name in ("aio", "uring")])
def test_hint_names_what_helps_when_the_kernel_has_no_more_queues(scene, name, monkeypatch):
    def refused(call, *arguments):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(f"gms_core.snapshot.backends.{name}.system_call", refused)
    scene.fill_files()
    with pytest.raises(TransferFailed, match="cannot be set up: Resource temporarily unavailable") as caught:
        scene.restore(name)
    assert "'staged'" in caught.value.hint


def test_call_is_made_again_when_a_signal_interrupts_it():
    """As the C library's read does not: Python's own calls are repeated, those by number are not."""
    reader, writer = os.pipe()
    read = {"x86_64": 0, "aarch64": 63}[os.uname().machine]
    handled, thread = threading.Event(), threading.main_thread()
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.set())

    def disturb():
        deadline = time.monotonic() + 30
        while Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0] != str(read) and time.monotonic() < deadline:
            time.sleep(0.001)
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        handled.wait(30)
        os.write(writer, b"x")

    disturber = threading.Thread(target=disturb)
    ring = Ring(1, PAGE_BYTES)
    disturber.start()
    try:
        assert system_calls.system_call(read, reader, ring.buffers[0].address, 1) == 1
        assert handled.is_set()
        assert ring.buffers[0].view[0] == ord("x")
    finally:
        disturber.join()
        signal.signal(signal.SIGUSR1, before)
        ring.close()
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print(38)", "ENOSYS"),
        ("print(1)", "EPERM.*seccomp profile"),
        ("import os; os.kill(os.getpid(), 31)", "ends whoever calls io_setup .SIGSYS"),
        ("raise SystemExit('no ctypes')", "cannot be tried: no ctypes"),
        ("import time; time.sleep(60)", "has not come back after 0.3 seconds"),
    ],
)
def test_backend_says_why_when_the_kernel_or_a_sandbox_refuses(monkeypatch, script, words):
    monkeypatch.setattr(system_calls, "_TRY", script)
    monkeypatch.setattr(system_calls, "_DEADLINE_S", 0.3 if "sleep" in script else 10.0)
    with pytest.raises(BackendUnavailable, match=f"'aio' cannot be used here: .*{words}"):
        registry.usable("aio")


def test_backend_says_why_when_the_machine_is_of_a_kind_that_is_not_known(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    for name in ("aio", "uring"):
        with pytest.raises(BackendUnavailable, match="riscv64"):
            registry.usable(name)


def test_job_of_a_backend_is_what_was_asked_when_its_files_are_many(tmp_path):
    """Each file of a job is opened once, and those that no block lies in not at all."""
    scene = Scene(tmp_path, roots=1)
    scene.fill_files()
    missing, target = File(tmp_path / "not there", "root", PAGE_BYTES), Memory(scene.extent)
    with memory_for("host", scene.allocations) as memory:
        memory.ready(target.base)
        job = Job("restore", [*scene.files, missing], scene.pieces, scene.checksums, scene.block)
        assert registry.find("staged").open(job, memory).finish().bytes == scene.size
