"""Files that are in memory already are read there, and others past the page cache. The page cache is the kernel's."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from snapshot_transfers import PAGE_BYTES, Memory, Scene, usable_backends

from gms_core.errors import InvalidArgument
from gms_core.snapshot import registry
from gms_core.snapshot.files import JobFiles
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.page_cache import _lies_in_tmpfs, share_in_memory

MIB = 2**20


def evict(path):
    """Have the kernel forget a file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    if _lies_in_tmpfs(descriptor):
        os.close(descriptor)
        pytest.skip("needs temporary files on a disk: set TMPDIR to a directory that is no tmpfs")
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def load(path, size):
    """Have the kernel read a file's begin, and no more."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
    assert len(os.pread(descriptor, size, 0)) == size
    os.close(descriptor)


def share(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return share_in_memory(descriptor, path.stat().st_size)
    finally:
        os.close(descriptor)


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    made.fill_files()
    for file in made.files:
        evict(file.path)
    return made


@pytest.mark.parametrize("size", [PAGE_BYTES, 5 * MIB + PAGE_BYTES, 200 * MIB])
def test_share_is_that_of_the_kernel_when_a_file_is_evicted_and_read(tmp_path, size):
    path = tmp_path / "file"
    with path.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(bytes(min(MIB, size - file.tell())))
    evict(path)
    assert share(path) == 0
    shares = []
    while 1 not in shares and len(shares) < 20:  # a kernel may take pages of files away again at any time
        load(path, size)
        shares.append(share(path))
    assert shares[-1] == 1


@pytest.mark.parametrize("size", [8, 127, 200])
def test_share_is_a_part_when_only_the_begin_is_in_memory(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size * MIB))
    evict(path)
    load(path, size * MIB // 4)
    assert 0.2 < share(path) < 0.3


def test_share_is_whole_when_a_file_lies_in_a_tmpfs():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        path = Path(place) / "file"
        path.write_bytes(bytes(3 * MIB))
        assert share(path) == 1


def test_share_is_nothing_when_a_file_is_empty(tmp_path):
    (tmp_path / "file").touch()
    assert share(tmp_path / "file") == 0


def test_kernel_is_not_asked_for_the_file_of_somebody_else(tmp_path, monkeypatch):
    """It would say that all of it is in memory, whether that is so or not."""
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    assert share(path) == 1
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert share(path) == 1  # it may be written to
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert share(path) == 0


@pytest.mark.parametrize(("direct", "evicted", "cached"), [("auto", True, "auto"), ("always", True, "always"), ("never", False, "never")])
def test_files_are_opened_past_the_page_cache_when_that_is_faster_or_asked_for(scene, direct, evicted, cached):
    def opened():
        files = JobFiles(scene.job(), direct=direct)
        found = [(file.is_direct, bool(fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & os.O_DIRECT)) for file in files]
        files.close()
        return found

    assert opened() == [(evicted, evicted)] * 2
    for file in scene.files:
        load(file.path, file.size)
    assert opened() == [(cached == "always",) * 2] * 2


@pytest.mark.parametrize("name", [name for name in usable_backends() if not name.endswith("-direct")])
def test_image_is_restored_from_memory_without_a_word_when_its_files_are_there(scene, name, monkeypatch):
    for file in scene.files:
        load(file.path, file.size)
    seen = []
    plain = JobFiles.are_in_memory.fget
    monkeypatch.setattr(JobFiles, "are_in_memory", property(lambda files: seen.append(plain(files)) or seen[-1]))
    target, moved = scene.restore(name, direct="auto")
    assert scene.holds(target)
    assert seen == [True]
    assert not any("page cache" in note for note in moved.notes)


def test_one_file_in_memory_changes_nothing_for_the_others(scene):
    load(scene.files[0].path, scene.files[0].size)
    files = JobFiles(scene.job(), direct="auto")
    assert [file.is_direct for file in files] == [False, True]
    assert not files.are_in_memory
    files.close()


@pytest.mark.parametrize(
    ("cores", "images", "threads", "spins"),
    [(32, 1, 12, True), (32, 2, 12, True), (16, 1, 12, True), (16, 2, 6, True), (4, 1, 4, False), (4, 2, 4, False)],
)
def test_images_share_the_processors_when_several_come_from_memory(tmp_path, monkeypatch, cores, images, threads, spins):
    scene = Scene(tmp_path, allocations=((0, 64 * 4 * 4096),))
    monkeypatch.setattr("gms_core.snapshot.staged.cores", lambda: cores)
    tuning = registry.find("staged").tuning(scene.without(options={}, at_once=images), in_memory=True)
    assert (tuning.workers, tuning.spin) == (threads, spins)


def test_disk_is_asked_when_a_snapshot_is_verified(scene):
    for file in scene.files:
        load(file.path, file.size)
    backend = registry.find("staged")
    assert backend.tuning(scene.without(options={})).direct == "auto"
    assert backend.tuning(scene.without(options={}, from_disk=True)).direct == "always"
    assert backend.tuning(scene.without(options={"direct": "never"}, from_disk=True)).direct == "never"


def test_disk_is_asked_for_files_in_memory_too_when_they_are_pinned_to_be_verified(scene):
    for file in scene.files:
        load(file.path, file.size)
    backend = registry.find("local-ssd-pinned")
    with memory_for("host", scene.allocations) as memory:
        target = Memory(scene.extent)
        memory.ready(target.base)
        bytes_before = read_from_disk()
        moved = backend.open(scene.without(options={}, from_disk=True), memory).finish()
    assert read_from_disk() - bytes_before >= scene.size
    assert moved.notes == ()


def read_from_disk():
    """Bytes that this process has had a disk read."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def test_option_is_refused_when_it_is_no_such_word(scene):
    with pytest.raises(InvalidArgument, match="direct='yes' is neither of auto, always, never"):
        registry.find("staged").check(scene.job(direct="yes"))
