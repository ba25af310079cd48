"""Saving is all or nothing: whatever fails on the way, the snapshots before are there, and the next save works."""

import errno
import os
import shutil
import stat
import threading

import msgspec
import pytest

from gms_core.errors import GmsError, InvalidArgument, SnapshotBusy, SnapshotDamaged, SnapshotMismatch, TransferFailed
from gms_core.snapshot.catalogue import entries, find
from gms_core.snapshot.folders import Folder
from gms_core.snapshot.locks import NameLock
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.pruning import prune
from gms_core.snapshot.staging import Staging, Target
from tests.unit.snapshot_stand_in import loads, roots_in, save_bytes, write_image

CALLS = ("open", "mkdir", "write", "pwrite", "fsync", "rename", "unlink", "rmdir", "listdir", "stat")
"""What the commit protocol asks of the kernel."""


def staged(tmp_path):
    return [path.name for path in tmp_path.glob("root*/model/.*")]


def save_by(roots, work, **options):
    """Save, with whatever is done while the staging folders are there."""
    with Staging.begin(roots, "model", **options) as staging:
        return work(staging)


def raises(error):
    def work(_):
        raise error

    return work


def test_versions_count_up_when_a_name_is_saved_again(tmp_path):
    roots = roots_in(tmp_path)
    assert [save_bytes(roots).version for _ in range(3)] == [1, 2, 3]
    assert save_bytes(roots, "other").version == 1
    assert staged(tmp_path) == []


def test_number_never_comes_again_when_its_save_has_failed(tmp_path):
    roots = roots_in(tmp_path)
    with pytest.raises(ZeroDivisionError):
        save_by(roots, raises(ZeroDivisionError()))
    assert save_bytes(roots).version == 2


def test_number_is_free_in_all_roots_when_one_of_them_is_new(tmp_path):
    first, second, third = roots_in(tmp_path, 3)
    save_bytes([first, second])
    save_bytes([first, second])
    assert save_bytes([third, second]).version == 3
    assert save_bytes([third]).version == 4


def test_snapshot_is_this_users_alone_when_it_is_saved(tmp_path):
    before = os.umask(0)
    try:
        roots = roots_in(tmp_path)
        with Staging.begin(roots, "model") as staging:
            os.umask(0o077)  # the files of the stand-in
            staging.commit([write_image(staging.target)])
            os.umask(0)
    finally:
        os.umask(before)
    for path in [*(tmp_path / "root0").rglob("*"), *(tmp_path / "root1").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_second_saver_is_refused_when_roots_overlap(tmp_path):
    first, second, third = roots_in(tmp_path, 3)
    with Staging.begin([first, second], "model") as staging:
        with pytest.raises(SnapshotBusy, match="another process saves or prunes snapshots 'model'"):
            Staging.begin([second, third], "model")
        assert save_bytes([third, first], "other").version == 1
        assert save_bytes([third]).version == 1
        staging.commit([write_image(staging.target)])
    assert save_bytes([second, third]).version == 2


def test_lock_is_waited_for_when_somebody_only_looks(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    done = threading.Event()

    def look():
        while not done.is_set():
            entries(roots)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        assert [save_bytes(roots).version for _ in range(5)] == list(range(2, 7))
    finally:
        done.set()
        looker.join()


def test_target_goes_to_another_process_when_it_is_written_as_json(tmp_path):
    with Staging.begin(roots_in(tmp_path), "model", stripe_bytes=2 * BLOCK_BYTES) as staging:
        assert msgspec.json.decode(msgspec.json.encode(staging.target), type=Target) == staging.target
        staging.commit([write_image(staging.target)])


@pytest.mark.parametrize(
    "options",
    [{"stripe_bytes": 4096}, {"weights": {"0" * 32: 1.0}}, {"name": "a/b"}, {"weights": "zero"}, {"weights": "infinite"}, {"roots": ()}],
)
def test_save_is_refused_when_its_options_are_wrong(tmp_path, options):
    roots = roots_in(tmp_path)
    given = {"roots": roots, "name": "model", **options}
    if isinstance(given.get("weights"), str):
        given["weights"] = {roots[0].id: 0.0 if given["weights"] == "zero" else float("inf")}
    with pytest.raises(InvalidArgument):
        Staging.begin(**given)
    assert not list(tmp_path.glob("root*/model/*"))


def test_images_are_refused_when_files_are_not_theirs(tmp_path):
    roots = roots_in(tmp_path)
    for spoil in (
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 4096),
        lambda path: path.with_name("stray").touch(),
        lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    ):

        def spoilt(staging, spoil=spoil):
            image = write_image(staging.target)
            spoil(next(tmp_path.glob("root1/model/.staging-*/images/0/*.shard")))
            staging.commit([image])

        with pytest.raises(SnapshotDamaged, match="staging"):
            save_by(roots, spoilt, stripe_bytes=BLOCK_BYTES)
    with pytest.raises(SnapshotDamaged, match="the same file"):
        save_by(roots, lambda staging: staging.commit([write_image(staging.target)] * 2))
    with pytest.raises(SnapshotDamaged, match="are not those that were saved"):
        save_by(roots, lambda staging: staging.commit([msgspec.structs.replace(write_image(staging.target), tensors=b"others")]))
    assert all(entry.state == "failed" for entry in entries(roots))


def test_failed_save_is_swept_when_the_next_one_begins(tmp_path):
    roots = roots_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save_by(roots, raises(KeyboardInterrupt()))
    assert entries(roots)[0].reason == "it was interrupted from the keyboard"
    with Staging.begin(roots, "model") as staging:
        assert len(staging.swept) == 2
        staging.commit([write_image(staging.target)])
    assert [entry.state for entry in entries(roots)] == ["committed"]


def test_save_that_ends_without_a_commit_is_told_when_nothing_was_raised(tmp_path):
    roots = roots_in(tmp_path)
    with Staging.begin(roots, "model"):
        pass
    assert entries(roots)[0].reason == "the save ended without a commit"


def test_resumed_save_is_the_same_one_when_roots_are_the_same(tmp_path):
    roots = roots_in(tmp_path)
    targets = []

    def fail(staging):
        targets.append(staging.target)
        raise TransferFailed("full")

    with pytest.raises(TransferFailed):
        save_by(roots, fail, weights={roots[1].id: 3.0})
    (first,) = targets
    with pytest.raises(SnapshotMismatch, match=rf"lies in roots .*{roots[1].id}"):
        Staging.begin(roots[:1], "model", resume=True)
    assert entries(roots)[0].state == "failed"
    with Staging.begin(tuple(reversed(roots)), "model", resume=True) as staging:
        assert staging.target.resumed
        assert (staging.target.plan, staging.target.folders) == (first.plan, first.folders)
        assert entries(roots)[0].state == "saving"
        staging.commit([write_image(staging.target)])
    assert loads(roots).version == 1
    with Staging.begin(roots, "model", resume=True) as staging:
        assert not staging.target.resumed
        staging.commit([write_image(staging.target)])


def failed_save(roots, **options):
    """A save that has written two images, and then has failed."""

    def work(staging):
        for index in range(2):
            write_image(staging.target, index)
        raise TransferFailed("full")

    with pytest.raises(TransferFailed):
        save_by(roots, work, stripe_bytes=BLOCK_BYTES, **options)


def test_images_that_are_no_more_go_when_a_save_is_resumed_with_fewer(tmp_path):
    roots = roots_in(tmp_path)
    failed_save(roots)
    with Staging.begin(roots, "model", resume=True) as staging:
        assert staging.target.resumed
        staging.commit([write_image(staging.target)])
    assert len(loads(roots).images) == 1
    assert not list(tmp_path.glob("root*/model/1/images/1"))


def test_number_never_comes_again_when_an_older_save_is_resumed(tmp_path):
    first, second, third = roots_in(tmp_path, 3)
    failed_save([first, second])
    assert save_bytes([second, third]).version == 2
    prune([second, third], "model", keep=0)
    with Staging.begin([first, second], "model", resume=True) as staging:
        assert (staging.target.plan.version, staging.target.resumed) == (3, False)
        staging.commit([write_image(staging.target)])
    assert save_bytes([second, third]).version == 4


def test_last_number_stays_when_an_older_one_is_begun(tmp_path):
    roots = roots_in(tmp_path)
    with NameLock(roots, "model") as lock:
        lock.begin_version(12)
        lock.begin_version(3)
        assert lock.last_version() == 12


def test_save_is_listed_and_resumed_when_its_commit_has_failed(tmp_path, monkeypatch):
    roots = roots_in(tmp_path)

    def fail(folder):
        raise TransferFailed("the disk burns")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "sync_all", fail)
        with pytest.raises(TransferFailed):
            save_bytes(roots)
    (entry,) = entries(roots)
    assert (entry.version, entry.state, entry.reason) == (1, "failed", "the disk burns")
    with Staging.begin(roots, "model", resume=True) as staging:
        assert (staging.target.plan.version, staging.target.resumed) == (1, True)
        staging.commit([write_image(staging.target)])
    assert loads(roots).version == 1
    assert not list(tmp_path.glob("root*/model/1/plan*"))


def test_parts_are_right_when_a_save_with_a_damaged_one_is_resumed(tmp_path):
    roots = roots_in(tmp_path)
    failed_save(roots)
    for path in tmp_path.glob("root*/model/.staging-*/part.json"):
        path.write_text("{")
    with Staging.begin(roots, "model", resume=True) as staging:
        assert staging.target.resumed
        staging.commit([write_image(staging.target)])
    assert loads(roots).version == 1


@pytest.mark.parametrize("is_read", [True, False])
def test_snapshot_is_taken_back_unless_it_is_read_when_its_last_file_may_not_stay(tmp_path, monkeypatch, is_read):
    roots, readers = roots_in(tmp_path), []
    write = Folder.write

    def fail(folder, name, *args):
        write(folder, name, *args)
        if name == "COMMITTED":
            if is_read:
                readers.append(find(roots, "model"))
            raise TransferFailed("the disk burns")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", fail)
        with pytest.raises(TransferFailed):
            save_bytes(roots)
    assert [entry.state for entry in entries(roots)] == ["committed" if is_read else "failed"]
    for reader in readers:
        reader.close()
        assert loads(roots).version == 1


def count_calls(monkeypatch, raises_at):
    """Have the n-th call fail, and count them."""
    made = []
    for name in CALLS:
        real = getattr(os, name)

        def call(*args, _real=real, _name=name, **kwargs):
            made.append(_name)
            if len(made) == raises_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
    return made


def test_former_snapshot_loads_and_the_next_is_saved_when_any_call_fails(tmp_path, monkeypatch):
    roots = roots_in(tmp_path)
    former = save_bytes(roots)
    opened = len(os.listdir("/proc/self/fd"))
    failures, reasons = [], 0
    for number in range(1, 1000):
        with monkeypatch.context() as patch:
            made = count_calls(patch, number)
            try:
                saved = save_bytes(roots, first=b"y" * 4096)
            except GmsError as error:
                failures.append(str(error))
                saved = None
        if len(made) < number:
            break
        if saved is None:
            newest = loads(roots)
            assert newest == former, f"after call {number}, {made[-1]}"
            told = [entry for entry in entries(roots) if entry.state == "failed"]
            assert all("Input/output error" in entry.reason for entry in told), f"after call {number}, {made[-1]}"
            reasons += len(told)
        else:  # it was not needed
            former = saved
        if number % 5 == 0:
            former = save_bytes(roots)
            assert loads(roots) == former
            prune(roots, "model", keep=1)
    assert saved is not None
    assert loads(roots) == saved
    assert len(failures) > 30
    assert reasons > 15
    assert len(os.listdir("/proc/self/fd")) == opened
    assert all("Input/output error" in failure for failure in failures)
    assert staged(tmp_path) == []


def test_former_snapshot_loads_when_a_disk_is_full(tmp_path, monkeypatch):
    roots = roots_in(tmp_path)
    former = save_bytes(roots)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(TransferFailed, match=r"No space left on device.*prune"):
            save_bytes(roots)
    assert loads(roots) == former
    assert save_bytes(roots).version == 3


def test_save_is_told_when_a_root_vanishes_meanwhile(tmp_path):
    roots = roots_in(tmp_path)
    former = save_bytes(roots)

    def work(staging):
        image = write_image(staging.target)
        shutil.rmtree(tmp_path / "root1")
        staging.commit([image])

    with pytest.raises(GmsError):
        save_by(roots, work, stripe_bytes=BLOCK_BYTES)
    assert entries(roots[:1])[0].id == former.id
