"""Removing snapshots: what is asked for and rubbish, and nothing else."""

import contextlib
import errno
import fcntl
import os
import shutil

import pytest

from gms_core.errors import GmsError, InvalidArgument, SnapshotBusy, SnapshotNotFound, TransferFailed
from gms_core.snapshot.catalogue import entries, find
from gms_core.snapshot.pruning import prune
from gms_core.snapshot.staging import Staging
from tests.unit.snapshot_stand_in import loads, roots_in, save_bytes
from tests.unit.test_snapshot_staging import count_calls


def versions(roots, name="model"):
    return [entry.version for entry in entries(roots, name) if entry.state == "committed"]


def folders(tmp_path):
    return sorted(f"{path.parts[-3]}/{path.name}" for path in tmp_path.glob("root*/model/*") if path.is_dir())


def test_newest_are_kept_when_others_are_pruned(tmp_path):
    roots = roots_in(tmp_path)
    for _ in range(4):
        save_bytes(roots)
    save_bytes(roots, "other")
    assert prune(roots, "model", keep=2).removed == (1, 2)
    assert versions(roots) == [3, 4]
    assert folders(tmp_path) == ["root0/3", "root0/4", "root1/3", "root1/4"]
    assert prune(roots, "model", version=4).removed == (4,)
    assert prune(roots, "model", keep=0).removed == (3,)
    assert versions(roots, "other") == [1]
    assert save_bytes(roots).version == 5


def test_nothing_but_rubbish_goes_when_no_number_is_named(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    with pytest.raises(GmsError), Staging.begin(roots, "model"):
        raise GmsError("failed")
    pruned = prune(roots, "model")
    assert (pruned.removed, len(pruned.swept)) == ((), 2)
    assert folders(tmp_path) == ["root0/1", "root1/1"]


def test_snapshot_stays_when_it_is_being_read(tmp_path):
    roots = roots_in(tmp_path)
    for _ in range(3):
        save_bytes(roots)
    with find(roots, "model@1") as snapshot:
        pruned = prune(roots, "model", keep=1)
        assert (pruned.removed, pruned.in_use) == ((2,), (1,))
        with pytest.raises(SnapshotBusy, match="model@1 is being read"):
            prune(roots, "model", version=1)
        assert len(snapshot.files(0)) == 2
    assert prune(roots, "model", keep=1).removed == (1,)


def test_prune_is_refused_when_somebody_saves(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    with Staging.begin(roots, "model"), pytest.raises(SnapshotBusy):
        prune(roots, "model", keep=0)
    assert versions(roots) == [1]


def test_nothing_is_removed_when_a_root_is_missing(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    save_bytes(roots)
    with pytest.raises(SnapshotNotFound, match=f"also in root {roots[1].id}"):
        prune(roots[:1], "model", keep=1)
    assert versions(roots) == [1, 2]
    assert prune(roots[1:], "model").swept == ()
    assert loads(roots)
    assert prune(roots[:1], "model", version=1, incomplete=True).removed == (1,)
    assert folders(tmp_path) == ["root0/2", "root1/1", "root1/2"]
    assert len(prune(roots, "model").swept) == 1  # now it is known that the part belongs to nothing
    assert folders(tmp_path) == ["root0/2", "root1/2"]


def test_last_good_snapshot_stays_when_a_newer_one_is_damaged(tmp_path):
    roots = roots_in(tmp_path)
    for _ in range(3):
        save_bytes(roots)
    (tmp_path / "root0/model/3/manifest.json").write_text("{}")
    assert prune(roots, "model", keep=1).removed == (1,)
    assert loads(roots, "model@2")
    assert prune(roots, "model", keep=0).removed == (2,)
    assert folders(tmp_path) == ["root0/3", "root1/3"]
    assert prune(roots, "model", version=3).removed == (3,)
    assert folders(tmp_path) == []


def test_parts_go_when_their_first_root_is_lost(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    save_bytes(roots)
    save_bytes(roots[1:])
    shutil.rmtree(tmp_path / "root0")
    assert prune(roots[1:], "model").swept == ()
    assert prune(roots[1:], "model", version=3, incomplete=True).swept == ()
    assert len(prune(roots[1:], "model", keep=1, incomplete=True).swept) == 2
    assert folders(tmp_path) == []


def test_snapshot_is_removed_when_locks_are_those_of_nfs(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(descriptor, operation):
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if operation & fcntl.LOCK_EX and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    roots = roots_in(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    save_bytes(roots)
    assert prune(roots, "model", keep=0).removed == (1,)


def test_file_is_named_when_it_cannot_be_locked(tmp_path, monkeypatch):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    real = fcntl.flock

    def flock(descriptor, operation):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("manifest.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(TransferFailed, match=r"manifest\.json cannot be locked: Input/output error"):
        prune(roots, "model", keep=0)


def test_damaged_snapshot_goes_when_it_is_asked_for(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    (tmp_path / "root0/model/1/manifest.json").unlink()
    shutil.rmtree(tmp_path / "root0/model/1/images")
    assert prune(roots, "model", version=1).removed == (1,)
    assert folders(tmp_path) == []


@pytest.mark.parametrize("options", [{"keep": -1}, {"keep": 1, "version": 1}, {"version": -1}])
def test_prune_is_refused_when_its_options_are_wrong(tmp_path, options):
    with pytest.raises(InvalidArgument):
        prune(roots_in(tmp_path), "model", **options)


def test_prune_is_told_when_there_is_no_such_snapshot(tmp_path):
    roots = roots_in(tmp_path)
    with pytest.raises(SnapshotNotFound, match="no snapshot model in"):
        prune(roots, "model", keep=1)
    assert not (tmp_path / "root0/model").exists()
    save_bytes(roots)
    with pytest.raises(SnapshotNotFound, match="no snapshot model@2"):
        prune(roots, "model", version=2)


def test_snapshots_that_stay_load_when_any_call_of_a_removal_fails(tmp_path, monkeypatch):
    roots = roots_in(tmp_path)
    kept = save_bytes(roots)
    for number in range(1, 1000):
        kept = save_bytes(roots)
        with monkeypatch.context() as patch:
            made = count_calls(patch, number)
            with contextlib.suppress(GmsError):
                prune(roots, "model", keep=1)
        assert loads(roots) == kept, f"after call {number}, {made[-1]}"
        if len(made) < number:
            break
        prune(roots, "model", keep=1)
        assert folders(tmp_path) == [f"root{root}/{kept.version}" for root in range(2)]
    assert versions(roots) == [kept.version]
    assert folders(tmp_path) == [f"root{number}/{kept.version}" for number in range(2)]
    assert not [name for name in os.listdir(tmp_path / "root0/model") if name.startswith(".")]
