"""Snapshots in object stores, without a server of GMS: who gets a number, what decides, and what may be removed."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from obstore.store import MemoryStore

from gms_core.errors import BackendUnavailable, InvalidArgument, SnapshotBusy, SnapshotDamaged, SnapshotNotFound, TransferFailed
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.objects import versions as versions_module
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.records import CLAIM, Claim
from gms_core.snapshot.objects.staging import ObjectStaging
from gms_core.snapshot.on_disk import COMMITTED, MANIFEST
from gms_core.snapshot.shelves import open_shelf
from tests.unit.object_stores import Harm, files_below, forget_frames, holds, objects_in, put_image, save_objects
from tests.unit.publishing import PAGE


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path):
    return Bucket("s3://in-memory/prefix", MemoryStore()) if request.param == "memory" else Bucket(f"file://{tmp_path}/objects")


@pytest.fixture
def shelf(bucket):
    return objects_in(bucket)


def begin(shelf, name="model"):
    return ObjectStaging.begin(shelf.root, name, stripe_bytes=BLOCK_BYTES, shard_bytes=BLOCK_BYTES)


def states(shelf, name=""):
    return [(one.name, one.version, one.state) for one in shelf.entries(name)]


def by_another_machine(bucket, folder, **changes):
    """Have a claim be of a process of which nothing is known here."""
    claim = msgspec.json.decode(bucket.read(f"{folder}/{CLAIM}"), type=Claim)
    saver = msgspec.structs.replace(claim.saver, boot="another", host="another-host", **changes)
    bucket.write(f"{folder}/{CLAIM}", msgspec.json.encode(msgspec.structs.replace(claim, saver=saver)))


def by_a_dead_process(bucket, folder):
    """Have a claim be of a process of this machine that has ended."""
    process = subprocess.Popen(["sleep", "100"])
    claim = msgspec.json.decode(bucket.read(f"{folder}/{CLAIM}"), type=Claim)
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    saver = msgspec.structs.replace(claim.saver, pid=process.pid, started=started)
    process.kill()
    process.wait()
    bucket.write(f"{folder}/{CLAIM}", msgspec.json.encode(msgspec.structs.replace(claim, saver=saver)))


def test_snapshots_are_found_when_they_were_committed(shelf):
    first, second = save_objects(shelf, first=b"1"), save_objects(shelf, first=b"2")
    other = save_objects(shelf, "other", first=b"3")
    assert (first.version, second.version, other.version) == (1, 2, 1)
    assert states(shelf) == [("model", 1, "committed"), ("model", 2, "committed"), ("other", 1, "committed")]
    assert [holds(shelf, wanted) for wanted in ("model", "model@1", "other")] == [b"2", b"1", b"3"]
    assert [entry.path for entry in shelf.entries("other")] == [f"{shelf.root.bucket.url}/other/1"]
    assert shelf.entries("unknown") == []
    with pytest.raises(SnapshotNotFound, match="there is no snapshot model@7"):
        shelf.find("model@7")


def test_nothing_is_a_snapshot_when_a_save_has_not_committed(shelf, caplog):
    former = save_objects(shelf, first=b"1")
    with begin(shelf) as staging:
        put_image(shelf.root.bucket, staging.target)
        assert states(shelf)[1:] == [("model", 2, "saving")]
        assert holds(shelf) == b"1"
        assert "model@2 in" in caplog.text
        with pytest.raises(SnapshotNotFound, match=r"model@2 at .*/model/2 is no snapshot \(yet\): it is being saved"):
            shelf.find("model@2")
    assert states(shelf)[1:] == [("model", 2, "failed")]
    assert "ended without a commit" in shelf.entries()[1].reason
    assert save_objects(shelf).version == 3, "a number that was begun is not given again"
    assert states(shelf) == [("model", 1, "committed"), ("model", 3, "committed")]
    with shelf.find("model@1") as snapshot:
        assert snapshot.manifest == former


def test_save_is_refused_when_the_store_replaces_what_is_there(s3):
    shelf = open_shelf([s3.url], create=True)
    s3.harm.append(Harm("PUT", "gms-root", times=1000, drop_headers=("if-none-match",)))
    with pytest.raises(BackendUnavailable, match="replaces objects that are to be made only where there are none"):
        save_objects(shelf)
    assert objects_in(shelf.root.bucket).root.id == shelf.root.id, "the question changes nothing"


@pytest.mark.parametrize("notices", [True, False])
def test_commit_is_refused_when_somebody_has_given_the_version_up(shelf, notices):
    save_objects(shelf, first=b"1")

    def save_meanwhile():
        with begin(shelf) as staging:
            image = put_image(shelf.root.bucket, staging.target)
            assert shelf.prune("model", version=2).swept == (f"{shelf.root.bucket.url}/model/2",)
            if not notices:  # it goes on to write what is gone
                put_image(shelf.root.bucket, staging.target)
            staging.commit([image])

    with pytest.raises(SnapshotBusy, match=r"model@2 was given up while it was saved at .*, by .*: it was removed by its version"):
        save_meanwhile()
    assert states(shelf) == [("model", 1, "committed"), ("model", 2, "failed")]
    assert shelf.prune("model").swept == (f"{shelf.root.bucket.url}/model/2",)
    assert shelf.root.bucket.objects("model/2").keys() == {COMMITTED}
    assert save_objects(shelf).version == 3


def test_only_what_has_ended_is_removed_when_others_may_save(shelf, monkeypatch):
    bucket = shelf.root.bucket
    lives, dead, elsewhere, old = (begin(shelf) for _ in range(4))
    for staging in (lives, dead, elsewhere, old):
        put_image(bucket, staging.target)
    by_a_dead_process(bucket, "model/2")
    by_another_machine(bucket, "model/3")
    by_another_machine(bucket, "model/4")
    bucket.delete([f"model/4/{CLAIM}"])  # of one without a claim nothing is known, either
    assert [state for _, _, state in states(shelf)] == ["saving", "unfinished", "saving", "saving"]
    assert "another-host has begun it at" in shelf.entries()[2].reason
    assert "whether that goes on cannot be seen from here" in shelf.entries()[3].reason
    committed = save_objects(shelf)  # removes what has certainly ended
    assert [(version, state) for _, version, state in states(shelf)] == [
        (1, "saving"),
        (3, "saving"),
        (4, "saving"),
        (committed.version, "committed"),
    ]
    assert shelf.prune("model").swept == ()
    assert set(shelf.prune("model", incomplete=True).swept) == {f"{bucket.url}/model/{number}" for number in (1, 3, 4)}
    assert states(shelf) == [("model", 5, "committed")]
    assert [bucket.objects(f"model/{number}").keys() for number in (1, 2, 3, 4)] == [{COMMITTED}] * 4


def test_removal_says_so_when_it_takes_a_save_for_ended_since_nothing_was_written(shelf, monkeypatch, caplog):
    bucket = shelf.root.bucket
    staging = begin(shelf)
    image = put_image(bucket, staging.target)
    by_another_machine(bucket, "model/1")
    monkeypatch.setattr(versions_module, "IDLE_S", -1.0)
    assert states(shelf) == [("model", 1, "unfinished")]
    save_objects(shelf)
    assert states(shelf)[0] == ("model", 1, "unfinished"), "a save removes nothing by a clock"
    with caplog.at_level(logging.WARNING):
        assert shelf.prune("model").swept == (f"{bucket.url}/model/1",)
    assert "model@1 is given up, though whether it is still being saved is not known: nothing was written since" in caplog.text
    assert not [key for key in bucket.objects("model") if key.startswith("clock")]
    put_image(bucket, staging.target)
    with pytest.raises(SnapshotBusy, match="nothing was written since"), staging:
        staging.commit([image])


def test_newest_stay_when_older_ones_are_pruned(shelf):
    bucket = shelf.root.bucket
    for number in range(4):
        save_objects(shelf, first=bytes([number]))
    bucket.write(f"model/3/{MANIFEST}", b"{}")
    assert states(shelf)[2] == ("model", 3, "damaged")
    assert shelf.prune("model", keep=2).removed == (1,)
    assert [(version, state) for _, version, state in states(shelf)] == [(2, "committed"), (3, "damaged"), (4, "committed")]
    assert shelf.prune("model", version=3).removed == (3,)
    assert shelf.prune("model", keep=0).removed == (2, 4)
    assert shelf.entries() == []
    with pytest.raises(SnapshotNotFound):
        shelf.find("model")
    with pytest.raises(SnapshotNotFound):
        shelf.prune("model", version=4)
    with pytest.raises(SnapshotNotFound):
        shelf.prune("unknown")
    with pytest.raises(InvalidArgument):
        shelf.prune("model", keep=1, version=2)
    assert save_objects(shelf).version == 5


def test_error_names_the_object_when_it_is_not_what_was_saved(shelf):
    bucket = shelf.root.bucket
    save_objects(shelf, first=b"1")
    save_objects(shelf, first=b"2")
    shard = next(key for key in bucket.objects("model/2") if key.endswith(".shard"))
    bucket.write(f"model/2/{shard}", b"short")
    with (
        shelf.find("model") as snapshot,
        pytest.raises(SnapshotDamaged, match=rf"{bucket.url}/model/2/{shard} has 5 bytes, and {3 * PAGE} were saved"),
    ):
        snapshot.files(0)
    bucket.delete([f"model/2/{shard}"])
    with shelf.find("model") as snapshot, pytest.raises(SnapshotNotFound, match=f"{bucket.url}/model/2/{shard} is not there"):
        snapshot.files(0)
    bucket.write(f"model/2/{MANIFEST}", b"{}")
    with pytest.raises(SnapshotDamaged, match="its checksum differs") as raised:
        shelf.find("model")
    assert "There is also model@1." in raised.value.hint
    bucket.write(f"model/2/{COMMITTED}", b"{}")
    with pytest.raises(SnapshotDamaged, match=f"{bucket.url}/model/2/COMMITTED cannot be understood"):
        shelf.find("model")
    bucket.delete([f"model/2/{MANIFEST}", f"model/2/{COMMITTED}"])
    assert holds(shelf) == b"1"


def test_commit_is_refused_when_an_object_is_not_as_it_was_written(shelf):
    bucket = shelf.root.bucket

    def save_badly():
        with begin(shelf) as staging:
            image = put_image(bucket, staging.target)
            bucket.delete([f"model/1/{image.shards[0].path}"])
            staging.commit([image])

    with pytest.raises(SnapshotDamaged, match="has no bytes where the images have"):
        save_badly()
    (entry,) = shelf.entries()
    assert entry.state == "failed"
    assert "has no bytes where the images have" in entry.reason
    assert COMMITTED not in bucket.objects("model/1")


def test_setting_is_named_when_it_forbids_to_make_objects_once(s3, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(TransferFailed, match="since the environment forbids that") as raised:
        open_shelf([s3.url], create=True)
    forget_frames(raised.value)
    assert "AWS_CONDITIONAL_PUT" in raised.value.hint


def test_newest_is_found_when_what_is_unfinished_cannot_be_looked_at(s3):
    shelf = open_shelf([s3.url], create=True)
    save_objects(shelf, first=b"1")
    staging = begin(shelf)
    s3.harm.append(Harm("GET", f"model/2/{CLAIM}$", times=100, status=403, word="AccessDenied"))
    assert holds(shelf) == b"1"
    s3.harm.clear()
    staging.close()


def test_newest_unfinished_one_and_what_can_be_restored_are_named_when_there_is_no_such_snapshot(shelf):
    stagings = [begin(shelf) for _ in range(2)]
    with pytest.raises(SnapshotNotFound, match=r"model@2 at .* is no snapshot \(yet\)"):
        shelf.find("model")
    for staging in stagings:
        staging.close()
    save_objects(shelf)
    save_objects(shelf)
    shelf.prune("model", version=3)
    with pytest.raises(SnapshotNotFound) as raised:
        shelf.find("model@9")
    assert "Its versions are: 4." in raised.value.hint


def test_resume_is_refused_when_the_root_is_in_an_object_store(shelf):
    with pytest.raises(InvalidArgument, match="a save to an object store is not resumed"):
        shelf.begin("model", resume=True, stripe_bytes=BLOCK_BYTES, shard_bytes=BLOCK_BYTES)
    assert shelf.root.bucket.objects().keys() == {"gms-root"}


def test_url_is_refused_when_it_is_no_root(tmp_path, s3):
    with pytest.raises(SnapshotNotFound, match="is no root of snapshots: it has no object gms-root"):
        open_shelf([s3.url])
    with pytest.raises(SnapshotNotFound, match="is not there"):
        open_shelf([f"file://{tmp_path}/none"])
    with pytest.raises(SnapshotNotFound, match=f"{tmp_path}/none is not there"):
        open_shelf([f"file://{tmp_path}/none/below"], create=True)
    with pytest.raises(InvalidArgument, match="is given beside other roots"):
        open_shelf([s3.url, tmp_path], create=True)
    Bucket(s3.url).write("gms-root", b"no id")
    with pytest.raises(SnapshotDamaged, match="gms-root holds no id of a root"):
        open_shelf([s3.url])


def test_prefix_and_directory_hold_the_same_when_one_is_a_copy_of_the_other(tmp_path, caplog):
    url, path = f"file://{tmp_path}/root", tmp_path / "root"
    objects = open_shelf([url], create=True)
    for number in range(3):
        save_objects(objects, first=bytes([number]))
    objects.prune("model", version=3)
    directory = open_shelf([path])
    os.mkdir(path / "model/7", 0o700)
    (path / "model/7" / COMMITTED).write_text("no trace of a removal")
    with pytest.raises(SnapshotDamaged):
        directory.find("model")
    assert [(one.version, one.state) for one in directory.entries()][-1] == (7, "damaged")
    (path / "model/7" / COMMITTED).unlink()
    (path / "model/7").rmdir()
    assert [(one.version, one.state, one.size) for one in directory.entries()] == [(one.version, one.state, one.size) for one in objects.entries()]
    with directory.find("model") as snapshot:
        assert (snapshot.manifest.version, len(snapshot.files(0))) == (2, 1)
    with caplog.at_level(logging.WARNING):
        directory.prune("model", keep=0)
    assert "is not counted" not in caplog.text, "what is left of a snapshot that was removed is no news"
    assert [name for name in files_below(path) if name.endswith(".shard")] == []
    assert save_objects(objects).version == 4, "a directory remembers the last number in another place"
