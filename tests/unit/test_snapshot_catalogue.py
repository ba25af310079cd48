"""Which snapshots there are, and what is said of those that cannot be restored."""

import fcntl
import os
import shutil

import msgspec
import pytest
import xxhash

from gms_core.errors import InvalidArgument, PermissionRefused, SnapshotBusy, SnapshotDamaged, SnapshotMismatch, SnapshotNotFound, TransferFailed
from gms_core.snapshot.catalogue import entries, find
from gms_core.snapshot.manifest import FORMAT, encode
from gms_core.snapshot.on_disk import Committed, write
from gms_core.snapshot.roots import open_roots
from gms_core.snapshot.staging import Staging
from tests.unit.snapshot_stand_in import loads, roots_in, save_bytes


def states(roots, name=""):
    return [(entry.name, entry.version, entry.state) for entry in entries(roots, name)]


def seal(path, text):
    """Change a committed manifest, with a checksum that fits."""
    (path / "manifest.json").write_bytes(text)
    identifier = msgspec.json.decode((path / "COMMITTED").read_bytes())["id"]
    (path / "COMMITTED").write_bytes(write(Committed(FORMAT, identifier, xxhash.xxh3_64_hexdigest(text))))


def test_newest_version_is_found_when_none_is_named(tmp_path):
    roots = roots_in(tmp_path)
    first, second = save_bytes(roots), save_bytes(roots, first=b"y" * 4096, images=2)
    assert loads(roots) == second
    assert loads(roots, "model@1") == first
    assert states(roots) == [("model", 1, "committed"), ("model", 2, "committed")]
    line = entries(roots)[1]
    assert (line.images, line.size, line.id, line.path) == (2, second.size, second.id, roots[0].path / "model/2")


def test_snapshot_is_found_when_its_disks_are_mounted_elsewhere_and_in_another_order(tmp_path):
    saved = save_bytes(roots_in(tmp_path))
    (tmp_path / "root0").rename(tmp_path / "moved")
    assert loads(open_roots([tmp_path / "root1", tmp_path / "moved"])) == saved


def test_list_is_empty_when_roots_hold_nothing_of_gms(tmp_path):
    roots = roots_in(tmp_path)
    (tmp_path / "root0/lost+found").mkdir()
    (tmp_path / "root0/other/1").mkdir(parents=True)
    (tmp_path / "root0/file").write_text("")
    assert entries(roots) == []
    with pytest.raises(SnapshotNotFound, match="no snapshot model in these roots"):
        find(roots, "model")


def test_versions_are_named_when_another_one_is_wanted(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    with pytest.raises(SnapshotNotFound, match=r"no snapshot model@7.*Its versions are: 1"):
        find(roots, "model@7")


def test_reason_is_told_when_a_save_has_failed(tmp_path):
    roots = roots_in(tmp_path)
    with pytest.raises(TransferFailed), Staging.begin(roots, "model"):
        raise TransferFailed("the disk is gone", hint="Mount it")
    assert states(roots) == [("model", 1, "failed")]
    assert entries(roots)[0].reason == "the disk is gone. Mount it"
    with pytest.raises(SnapshotNotFound, match=r"model@1 .* is no snapshot \(yet\): the disk is gone"):
        find(roots, "model")


def test_list_tells_that_a_save_goes_on_when_it_does(tmp_path):
    roots = roots_in(tmp_path)
    with Staging.begin(roots, "model") as staging:
        assert states(roots) == [("model", 1, "saving")]
        staging._lock.close()
        assert states(roots) == [("model", 1, "unfinished")]


def test_root_is_named_when_it_was_not_given(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    with find(roots[:1], "model") as snapshot, pytest.raises(SnapshotNotFound, match=rf"root {roots[1].id} was not given.*--root"):
        snapshot.files(0)
    assert states(roots[1:]) == [("model", 1, "part")]
    with pytest.raises(SnapshotNotFound, match=rf"manifest is in root {roots[0].id}, which was not given"):
        find(roots[1:], "model")


def test_roots_are_to_be_told_apart_when_two_have_the_same_version(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots[:1])
    save_bytes(roots[1:])
    with pytest.raises(InvalidArgument, match="Give the root of one of them"):
        find(roots, "model")
    assert loads(roots[:1])


def test_snapshot_is_found_when_a_part_of_it_is_refused(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    (tmp_path / "root1/model/1").chmod(0o777)
    with find(roots, "model") as snapshot, pytest.raises(PermissionRefused, match="everybody may write to"):
        snapshot.files(0)


def test_reason_is_told_when_the_folder_of_a_name_is_refused(tmp_path, caplog):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    save_bytes(roots, "other")
    for root in roots:
        (root.path / "model").chmod(0o777)
    with pytest.raises(PermissionRefused, match="everybody may write to"):
        find(roots, "model")
    assert states(roots) == [("other", 1, "committed")]
    assert "root0/model is left out: everybody may write to" in caplog.text


def test_older_version_is_not_taken_when_the_newest_has_its_manifest_in_a_root_that_is_missing(tmp_path):
    first, second = roots_in(tmp_path)
    older = save_bytes([second])
    save_bytes([first, second])
    with pytest.raises(SnapshotNotFound, match=rf"model@2 is newer .* in root {first.id}, which was not given.*name model@1 to have the older one"):
        find([second], "model")
    assert loads([second], "model@1") == older
    assert loads([first, second]).version == 2


def shard(tmp_path, root=0):
    return next((tmp_path / f"root{root}/model/1/images/0").iterdir())


def test_file_is_named_when_a_bit_of_it_has_changed(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    for path in sorted((tmp_path / "root0/model/1").rglob("*")):
        if path.is_dir() or path.name == "part.json":
            continue
        before = path.read_bytes()
        path.write_bytes(before[:40] + bytes([before[40] ^ 4]) + before[41:])
        with pytest.raises((SnapshotDamaged, SnapshotMismatch)) as caught:
            loads(roots)
        assert path.name in str(caught.value) or path.name == "COMMITTED"
        path.write_bytes(before)
    assert loads(roots)


def test_file_is_named_when_it_is_cut_off_or_gone(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    path = shard(tmp_path, 1)
    size = path.stat().st_size
    os.truncate(path, size - 4096)
    with find(roots, "model") as snapshot:
        with pytest.raises(SnapshotDamaged, match=rf"shard has {size - 4096} bytes, and {size} were saved"):
            snapshot.files(0)
        path.unlink()
        with pytest.raises(SnapshotNotFound, match="shard is not there"):
            snapshot.files(0)
        shutil.rmtree(tmp_path / "root1/model/1")
        with pytest.raises(SnapshotNotFound, match=f"root {roots[1].id} has lost its part"):
            snapshot.files(0)


def test_link_is_not_followed_when_it_stands_for_a_file_or_a_folder(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    path = shard(tmp_path, 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with find(roots, "model") as snapshot, pytest.raises(SnapshotDamaged, match="no regular file"):
        snapshot.files(0)
    path.unlink()
    path.parent.rename(tmp_path / "folder")
    path.parent.symlink_to(tmp_path / "folder")
    with find(roots, "model") as snapshot, pytest.raises(PermissionRefused, match="link"):
        snapshot.files(0)


def test_path_is_refused_when_it_leaves_the_root(tmp_path):
    roots = roots_in(tmp_path)
    manifest = save_bytes(roots)
    image = manifest.images[0]
    for path in ("../../../elsewhere", "/etc/passwd", "images/0/../../../x", "."):
        wrong = msgspec.structs.replace(image, shards=(msgspec.structs.replace(image.shards[0], path=path), *image.shards[1:]))
        seal(tmp_path / "root0/model/1", encode(msgspec.structs.replace(manifest, images=(wrong,))))
        with pytest.raises(SnapshotDamaged, match=r"manifest\.json.*no plain path inside"):
            find(roots, "model")


@pytest.mark.parametrize("number", [2**63, 2**64, 2**100, -4096])
def test_manifest_is_refused_when_a_number_is_none_that_a_disk_has(tmp_path, number):
    roots = roots_in(tmp_path)
    manifest = save_bytes(roots)
    image = manifest.images[0]
    forged = (
        {"allocations": ((number - number % 4096, 4096),)},
        {"allocations": ((0, number - number % 4096),)},
        {"generation": number},
        {"block_bytes": number},
        {"shards": (msgspec.structs.replace(image.shards[0], size=number), *image.shards[1:])},
        {"stripes": (msgspec.structs.replace(image.stripes[0], shard=number), *image.stripes[1:])},
    )
    for fields in forged:
        text = msgspec.json.encode(msgspec.to_builtins(msgspec.structs.replace(manifest, images=(msgspec.structs.replace(image, **fields),))))
        seal(tmp_path / "root0/model/1", text)
        with pytest.raises(SnapshotDamaged, match=r"manifest\.json is not a manifest: Expected `int`"):
            find(roots, "model")


def test_other_versions_are_named_when_the_newest_cannot_be_used(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    save_bytes(roots)
    path = tmp_path / "root0/model/2"
    seal(path, b'{"format": "gms-snapshot/2"}')
    with pytest.raises(SnapshotMismatch, match=r"manifest\.json is of the format 'gms-snapshot/2'.*There is also model@1"):
        find(roots, "model")
    (path / "manifest.json").write_text("{}")
    with pytest.raises(SnapshotDamaged, match=r"manifest\.json is not what was saved.*There is also model@1"):
        find(roots, "model")
    (path / "manifest.json").unlink()
    with pytest.raises(SnapshotDamaged, match=r"manifest\.json is not there"):
        find(roots, "model")
    assert states(roots) == [("model", 1, "committed"), ("model", 2, "damaged")]
    assert loads(roots, "model@1")


def test_snapshot_is_refused_when_its_files_were_moved_to_another_name(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    (tmp_path / "root0/model/1").rename(tmp_path / "root0/model/5")
    with pytest.raises(SnapshotDamaged, match=r"of the snapshot model@1.*not of model@5"):
        find(roots, "model")


def test_part_is_refused_when_it_is_of_another_snapshot(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    shutil.copytree(tmp_path / "root1/model/1", tmp_path / "copy")
    shutil.rmtree(tmp_path / "root1/model")
    (tmp_path / "root0/model").rename(tmp_path / "root0/kept")
    save_bytes(roots)
    shutil.rmtree(tmp_path / "root1/model/1")
    (tmp_path / "copy").rename(tmp_path / "root1/model/1")
    with find(roots, "model") as snapshot, pytest.raises(SnapshotDamaged, match="is not a part of snapshot model@1"):
        snapshot.files(0)


def test_snapshot_is_busy_when_it_is_being_removed(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    with (tmp_path / "root0/model/1/manifest.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SnapshotBusy, match="being removed"):
            find(roots, "model")


def test_image_is_refused_when_there_is_none_of_its_number(tmp_path):
    roots = roots_in(tmp_path)
    save_bytes(roots)
    with find(roots, "model") as snapshot, pytest.raises(InvalidArgument, match="no image 1"):
        snapshot.image(1)
