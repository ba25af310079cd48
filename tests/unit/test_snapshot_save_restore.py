"""Published memory to disks and back, with real servers: what comes back is a generation like any other, or nothing."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash

from gms_core.client import ReadLease
from gms_core.errors import (
    AcquireTimeout,
    ArenaTooSmall,
    GmsError,
    InvalidArgument,
    OutOfMemory,
    SnapshotDamaged,
    SnapshotMismatch,
    SnapshotNotFound,
    TransferFailed,
)
from gms_core.layout import Identity
from gms_core.snapshot import restore as restoring
from gms_core.snapshot.catalogue import entries, find
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.memory_host import HostMemory
from gms_core.snapshot.registry import find as named
from gms_core.snapshot.registry import usable
from gms_core.snapshot.restore import check_fits, restore_image, verify_image
from gms_core.snapshot.save import save_image
from gms_core.snapshot.staging import Staging
from tests.conftest import running_server
from tests.unit.publishing import MODEL, PAGE, generations, publish, read_all, until
from tests.unit.snapshot_stand_in import Plain, loads, roots_in, save_pool

SIZE = BLOCK_BYTES + 5 * PAGE + 17
SLAB = 512 * PAGE


@pytest.fixture(scope="module")
def data():
    return os.urandom(SIZE)


@contextlib.contextmanager
def another_server(**options):
    with tempfile.TemporaryDirectory(prefix="gms-") as directory, running_server(Path(directory), **options) as running:
        yield running


def restore(session, roots, backend=None, timeout_s=5, **options):
    with find(roots, "model") as snapshot:
        return restore_image(session, snapshot, 0, backend or Plain(), timeout_s=timeout_s, **options)


@pytest.fixture
def saved(server, tmp_path, data):
    """Roots with a snapshot of what the server has published, in several allocations."""
    roots = roots_in(tmp_path)
    with server.connect() as session, publish(session, data, slab=SLAB) as lease:
        save_pool(session, lease, roots)
    return roots


@pytest.mark.parametrize("name", ["plain", "staged", "aio", "uring", "local-ssd-striped", "local-ssd-pinned"])
def test_engine_attaches_as_to_any_generation_when_a_snapshot_was_restored(server, tmp_path, data, name):
    backend = Plain() if name == "plain" else named(name)
    if not backend.probe().usable:
        assert backend.probe().reason, "such as io_uring in a container"
        return
    roots = roots_in(tmp_path)
    with server.connect() as session, publish(session, data, slab=SLAB) as lease:
        before = lease.layout
        save_pool(session, lease, roots, backend=backend if "save" in backend.directions else Plain())
        with restore(session, roots, backend=backend, pool="copy").lease as restored:
            assert restored.pool == "copy"
    with server.connect() as session, session.acquire("copy", "auto", MODEL, timeout_s=1) as lease:
        assert isinstance(lease, ReadLease)
        assert (lease.layout.generation, lease.layout.digest, lease.layout.manifest) == (1, before.digest, b"manifest")
        assert [(one.offset, one.size) for one in lease.layout.allocations] == [(one.offset, one.size) for one in before.allocations]
        assert read_all(session, lease, SIZE) == data
    with find(roots, "model") as snapshot:
        assert verify_image(snapshot, 0, backend).bytes == before.size


class Endless(Plain):
    """What it has begun never ends."""

    is_quiet = False

    def open(self, job, memory):
        return self

    def poll(self):
        return 0

    def cancel(self):
        pass

    def finish(self):
        raise TransferFailed("it does not end")


def test_server_does_not_get_a_draft_back_when_something_may_still_be_written_to_it(saved, server, monkeypatch):
    kept, seen = [], []
    monkeypatch.setattr(restoring, "_kept", kept)
    with server.connect() as session, server.connect() as other:

        def writer():
            return next((pool.writer for pool in other.status().pools if pool.name == "copy"), 0)

        with pytest.raises(TransferFailed, match="it does not end"):
            restore(session, saved, Endless(), pool="copy", on_hang=lambda error: seen.append((error.message, writer())))
        assert seen == [("it does not end", session.welcome.session)]
        assert writer() == session.welcome.session
        for held, _ in kept:
            held.close()
        assert not writer()


def test_what_copies_need_is_given_up_last_when_an_image_is_restored(saved, server, monkeypatch):
    seen = []
    with server.connect() as session:
        monkeypatch.setattr(HostMemory, "close", lambda _: seen.append([pool.generation for pool in session.status().pools if pool.name == "copy"]))
        restore(session, saved, pool="copy").lease.release()
    assert seen == [[1]]


def test_layout_with_gaps_comes_back_when_it_is_restored(server, tmp_path):
    places = [(2 * PAGE, 3 * PAGE), (9 * PAGE, PAGE), (10 * PAGE, 4 * PAGE)]
    roots = roots_in(tmp_path)
    with server.connect() as session:
        lease = session.acquire("weights", "rw", MODEL, timeout_s=1)
        lease.arena.back(places)
        for offset, size in places:
            session.driver.write(lease.arena.address(offset), os.urandom(size))
        with lease.commit(b"manifest", MODEL) as read:
            save_pool(session, read, roots)
            with restore(session, roots, pool="copy").lease as restored:
                assert [(one.offset, one.size) for one in restored.layout.allocations] == places
                for offset, size in places:
                    ours, theirs = (session.driver.read(one.arena.address(offset), size) for one in (read, restored))
                    assert ours == theirs


def test_bytes_are_equal_when_a_snapshot_is_restored_to_another_server(saved, data):
    with another_server() as second, second.connect() as session:
        with restore(session, saved, expected=MODEL, pin=True).lease as lease:
            assert read_all(session, lease, SIZE) == data
        assert generations(session) == [(1, True, True, 0)]


def test_empty_layout_comes_back_when_it_is_restored(server, tmp_path):
    roots = roots_in(tmp_path)
    with server.connect() as session:
        with session.acquire("weights", "rw", MODEL, timeout_s=1).commit(b"nothing", MODEL) as lease:
            assert save_pool(session, lease, roots).size == 0
        with restore(session, roots, pool="copy").lease as restored:
            assert restored.layout.allocations == ()


def test_several_images_are_saved_at_once_when_devices_are_many(server, tmp_path, data):
    roots = roots_in(tmp_path)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(server.connect()) for _ in range(3)]
        leases = [stack.enter_context(publish(one, data[: 100 * PAGE + number], pool=f"pool{number}")) for number, one in enumerate(sessions)]
        staging = stack.enter_context(Staging.begin(roots, "model"))
        images = [None] * 3

        def save(number):
            images[number] = save_image(sessions[number], leases[number], staging.target, number, Plain()).image

        threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        staging.commit(images)
    assert [image.pool for image in loads(roots).images] == ["pool0", "pool1", "pool2"]


def nothing_published(session, pool="weights"):
    return not [one for one in session.status().pools if one.name == pool and one.generation] and not session.status().allocated_bytes


@pytest.mark.parametrize("root", [0, 1])
def test_nothing_is_published_when_a_bit_has_changed(saved, tmp_path, root):
    path = next((tmp_path / f"root{root}/model/1/images/0").iterdir())
    with path.open("r+b") as file:
        file.seek(4 * PAGE)
        byte = file.read(1)
        file.seek(4 * PAGE)
        file.write(bytes([byte[0] ^ 1]))
    with another_server() as second, second.connect() as session:
        for backend in (Plain(), usable("staged")):
            with pytest.raises(SnapshotDamaged, match=path.name):
                restore(session, saved, backend=backend)
            assert nothing_published(session)
            with find(saved, "model") as snapshot, pytest.raises(SnapshotDamaged, match=path.name):
                verify_image(snapshot, 0, backend)


class Lying(Plain):
    """Says that all went well, and has moved nothing."""

    def open(self, job, memory):
        transfer = super().open(job, memory)
        finish = transfer.finish

        def lie():
            moved = finish()
            return type(moved)(moved.bytes, moved.seconds, dict.fromkeys(moved.checksums, 0))

        transfer.finish = lie
        return transfer


def test_nothing_is_published_when_a_backend_is_wrong(server, saved):
    with server.connect() as session:
        before = session.status()
        with pytest.raises(SnapshotDamaged, match="transfer backend plain"):
            restore(session, saved, backend=Lying())
        assert [(one.name, one.generation) for one in session.status().pools] == [(one.name, one.generation) for one in before.pools]
        assert session.status().allocated_bytes == before.allocated_bytes


def test_nothing_is_published_when_the_memory_never_comes(saved):
    with another_server(host_memory=1024 * PAGE) as second, second.connect() as session:
        for backend in (Plain(), usable("staged")):
            with pytest.raises(OutOfMemory):
                restore(session, saved, backend=backend)
            assert nothing_published(session)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("gms-transfer")]


RESTORE_AND_HANG = """
import sys, time
from pathlib import Path
from gms_core.client import connect
from gms_core.snapshot.catalogue import find
from gms_core.snapshot.restore import restore_image
from gms_core.snapshot.roots import open_roots
from tests.unit.snapshot_stand_in import Plain

class Hanging(Plain):
    def open(self, job, memory):
        transfer = super().open(job, memory)
        finish = transfer.finish
        def hang():
            finish()
            print("moved", flush=True)
            time.sleep(1000)
        transfer.finish = hang
        return transfer

with connect(socket_path=Path(sys.argv[1])) as session, find(open_roots([Path(path) for path in sys.argv[2:]]), "model") as snapshot:
    restore_image(session, snapshot, 0, Hanging(), timeout_s=5)
"""


def test_nothing_is_published_when_a_restore_is_killed(saved):
    with another_server() as second, second.connect() as session:
        command = [sys.executable, "-c", RESTORE_AND_HANG, str(second.socket), *(str(root.path) for root in saved)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as restoring:
            assert restoring.stdout.readline() == "moved\n"
            assert session.status().allocated_bytes
            restoring.kill()
        until(lambda: nothing_published(session))
        with restore(session, saved).lease as lease:
            assert lease.layout.generation == 1


def test_waiting_for_the_writer_ends_when_it_takes_too_long(server, saved):
    reasons = []
    with server.connect() as session, server.connect() as busy, busy.acquire("weights", "rw", MODEL, timeout_s=1), pytest.raises(AcquireTimeout):
        restore(session, saved, backend=usable("staged"), timeout_s=0.1, on_wait=reasons.append)
    assert reasons


def test_image_is_refused_when_it_is_not_what_is_wanted(saved):
    with find(saved, "model") as snapshot:
        image = snapshot.image(0)
    check_fits(image, "host", PAGE, MODEL)
    with pytest.raises(SnapshotMismatch, match=r"dtype: 'fp8' != 'bf16'") as caught:
        check_fits(image, "host", PAGE, Identity({"content": "abc", "dtype": "fp8"}))
    assert list(caught.value.details) == ["dtype"]
    with pytest.raises(SnapshotMismatch, match="multiples of 4096 bytes, as device host has them, and not of this device's 2097152"):
        check_fits(image, "host", 2**21)
    with pytest.raises(SnapshotMismatch, match="saved from host memory, and this device has cuda memory"):
        check_fits(image, "cuda", PAGE)


def test_restore_is_refused_before_a_server_is_asked_when_a_root_is_missing(server, saved):
    with server.connect() as session:
        before = session.status()
        with pytest.raises(SnapshotNotFound, match="was not given"):
            restore(session, saved[:1])
        assert session.status().pools == before.pools


def test_blocks_are_not_written_again_when_a_save_is_resumed(server, tmp_path, data):
    roots = roots_in(tmp_path)
    with server.connect() as session, publish(session, data, slab=SLAB) as lease:

        def save(backend, fail, **options):
            with Staging.begin(roots, "model", stripe_bytes=BLOCK_BYTES, **options) as staging:
                saved = save_image(session, lease, staging.target, 0, backend)
                if fail:
                    raise TransferFailed("in the middle")
                staging.commit([saved.image])
                return saved

        with pytest.raises(TransferFailed):
            save(Plain(), True)
        shards = sorted(tmp_path.glob("root*/model/.staging-*/images/0/*.shard"))
        with shards[1].open("r+b") as file:
            file.write(b"wrong")
        backend = Plain()
        saved = save(backend, False, resume=True)
        assert backend.written == [1]
        assert saved.kept_bytes == BLOCK_BYTES
        assert loads(roots).images == (saved.image,)
        with restore(session, roots, pool="copy").lease as restored:
            assert read_all(session, restored, SIZE) == data


def test_pages_are_dropped_before_they_are_believed_when_a_save_is_resumed(server, tmp_path, data, monkeypatch):
    roots, asked = roots_in(tmp_path), []
    advise, read = os.posix_fadvise, os.preadv

    def dropped(descriptor, position, size, advice):
        asked.append((os.readlink(f"/proc/self/fd/{descriptor}"), "dropped" if advice == os.POSIX_FADV_DONTNEED else "", position, size))
        advise(descriptor, position, size, advice)

    def reads(descriptor, buffers, position):
        asked.append((os.readlink(f"/proc/self/fd/{descriptor}"), "read", position, sum(map(len, buffers))))
        return read(descriptor, buffers, position)

    with server.connect() as session, publish(session, data, slab=SLAB) as lease:
        with contextlib.suppress(TransferFailed), Staging.begin(roots, "model", stripe_bytes=BLOCK_BYTES) as staging:
            save_image(session, lease, staging.target, 0, Plain())
            raise TransferFailed("at the end")
        monkeypatch.setattr(os, "posix_fadvise", dropped)
        monkeypatch.setattr(os, "preadv", reads)
        save_pool(session, lease, roots, resume=True)
    reading = [place for place in asked if place[1] == "read"]
    assert len(reading) == 2
    for place in reading:
        path, _, position, size = place
        assert (path, "dropped", position, size) in asked[: asked.index(place)]


def test_all_is_written_when_another_layout_is_saved_in_a_resumed_save(server, tmp_path, data):
    roots = roots_in(tmp_path)
    with server.connect() as session:
        with publish(session, data, slab=SLAB) as lease, contextlib.suppress(TransferFailed), Staging.begin(roots, "model") as staging:
            save_image(session, lease, staging.target, 0, Plain())
            raise TransferFailed("in the middle")
        with publish(session, data, slab=SLAB, manifest=b"another") as lease:
            backend = Plain()
            manifest = save_pool(session, lease, roots, backend=backend, resume=True)
            assert backend.written == [0, 1]
            assert loads(roots) == manifest


def test_former_snapshot_loads_when_a_disk_fails_or_is_full(server, saved, data, monkeypatch):
    former = loads(saved)
    with server.connect() as session, session.acquire("weights", "ro", MODEL, timeout_s=1) as lease:
        for name, number, words in (
            ("fdatasync", errno.EIO, r"\.shard cannot be synced: Input/output error.*disk has failed"),
            ("posix_fallocate", errno.ENOSPC, r"\.shard cannot be given its room: No space left.*prune"),
        ):

            def fail(*_, number=number):
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                with pytest.raises(TransferFailed, match=words):
                    save_pool(session, lease, saved)
            assert loads(saved) == former
            assert entries(saved)[-1].state == "failed"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            with pytest.raises(TransferFailed, match=r"\.shard cannot be given its room: File too large.*ulimit -f"):
                save_pool(session, lease, saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2**10, f_frsize=4096, f_blocks=2**20))
            with pytest.raises(TransferFailed, match=r"model.* has 0\.00 GiB free, and 0\.08 GiB are to be written there.*prune"):
                save_pool(session, lease, saved)
        assert loads(saved) == former
        manifest = save_pool(session, lease, saved)
        assert loads(saved) == manifest


def test_generation_is_not_published_when_others_of_the_snapshot_are_not_there(server, saved):
    def fail():
        raise SnapshotDamaged("the image of another device is wrong")

    with server.connect() as session:
        before = session.status()
        with pytest.raises(SnapshotDamaged, match="another device"):
            restore(session, saved, pool="copy", before_commit=fail)
        after = session.status()
        assert (after.pools, after.allocated_bytes) == (before.pools, before.allocated_bytes)


def test_nothing_is_moved_when_all_of_a_resumed_save_was_written(server, tmp_path, data):
    roots = roots_in(tmp_path)
    with server.connect() as session, publish(session, data, slab=SLAB) as lease:
        with contextlib.suppress(TransferFailed), Staging.begin(roots, "model", stripe_bytes=BLOCK_BYTES) as staging:
            save_image(session, lease, staging.target, 0, Plain())
            raise TransferFailed("at the end")
        backend = Plain()
        save_pool(session, lease, roots, backend=backend, resume=True)
        assert backend.written == []
        assert loads(roots).size == lease.layout.size


def test_arena_is_not_backed_when_places_are_wrong(server):
    with server.connect() as session, session.acquire("weights", "rw", MODEL, timeout_s=1) as lease:
        for places, kind in (
            ([(0, PAGE + 1)], InvalidArgument),
            ([(0, 2 * PAGE), (PAGE, PAGE)], GmsError),
            ([(2**60, PAGE)], ArenaTooSmall),
        ):
            with pytest.raises(kind):
                lease.arena.back(places)
            assert lease.arena.allocations == ()
        lease.arena.back([(0, PAGE)])
        with pytest.raises(InvalidArgument, match="empty arena"):
            lease.arena.back([(PAGE, PAGE)])


def test_thousands_of_allocations_come_back_when_there_are_more_than_one_request_has(server, tmp_path, monkeypatch):
    monkeypatch.setattr("gms_core.client.arena.MOST_AT_ONCE", 7)
    places = [(number * PAGE, PAGE) for number in range(100)]
    with server.connect() as session, session.acquire("weights", "rw", MODEL, timeout_s=1) as lease:
        lease.arena.back(places)
        assert [(one.offset, one.size) for one in lease.arena.allocations] == places
        assert xxhash.xxh3_64_intdigest(session.driver.read(lease.arena.base, 100 * PAGE)) == xxhash.xxh3_64_intdigest(bytes(100 * PAGE))
