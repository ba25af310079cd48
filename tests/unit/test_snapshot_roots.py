"""Roots: known by their id wherever they are mounted, and refused when they are not safe or not large enough."""

import os
import threading
from types import SimpleNamespace

import pytest

from gms_core.errors import InvalidArgument, PermissionRefused, SnapshotDamaged, SnapshotNotFound, TransferFailed
from gms_core.snapshot.folders import Folder
from gms_core.snapshot.roots import check_room, open_root, open_roots


def test_root_keeps_its_id_when_it_is_moved(tmp_path):
    root = open_root(tmp_path / "a", create=True)
    assert open_root(tmp_path / "a", create=True) == root
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_root(tmp_path / "b").id == root.id
    assert os.listdir(tmp_path / "b") == ["gms-root"]


def test_root_has_one_id_when_many_make_it_at_once(tmp_path):
    found = []
    barrier = threading.Barrier(8)

    def make():
        barrier.wait()
        found.append(open_root(tmp_path / "a", create=True).id)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_root_is_made_when_its_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    root = open_root(tmp_path / "a", create=True)
    monkeypatch.undo()
    assert open_root(tmp_path / "a") == root


def test_directory_is_refused_when_it_is_no_root(tmp_path):
    with pytest.raises(SnapshotNotFound, match="gms-root"):
        open_root(tmp_path)
    with pytest.raises(SnapshotNotFound, match=r"missing is not there\. Mount the disk"):
        open_root(tmp_path / "missing")
    with pytest.raises(SnapshotNotFound, match=r"above is not there\. Mount"):
        open_root(tmp_path / "above/it", create=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionRefused):
        open_root(tmp_path / "file")


def test_root_is_refused_when_its_id_cannot_be_read(tmp_path):
    (tmp_path / "gms-root").write_text("mine\n")
    with pytest.raises(SnapshotDamaged, match="gms-root holds no id"):
        open_root(tmp_path)
    (tmp_path / "gms-root").unlink()
    (tmp_path / "gms-root").symlink_to("/etc/hostname")
    with pytest.raises(PermissionRefused, match="link"):
        open_root(tmp_path)


def test_roots_are_refused_when_two_are_one(tmp_path):
    open_root(tmp_path / "a", create=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/gms-root").write_text((tmp_path / "a/gms-root").read_text())
    with pytest.raises(InvalidArgument, match="are one root"):
        open_roots([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InvalidArgument, match="needs a root"):
        open_roots([])


def test_folder_is_refused_when_it_is_a_link_or_open_to_everybody(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with Folder.open(tmp_path) as folder:
        for name, words in (("link", "link"), ("open", "everybody may write")):
            with pytest.raises(PermissionRefused, match=words):
                folder.child(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_folder_is_refused_when_it_is_another_users(tmp_path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, -1)
    with Folder.open(tmp_path) as folder, pytest.raises(PermissionRefused, match="belongs to user 12345"):
        folder.child("theirs")


def test_file_is_as_it_was_when_it_cannot_be_written_anew(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with Folder.open(tmp_path) as folder:
        folder.write("file", b"old")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(TransferFailed, match=r"file cannot be written: No space left.*prune"):
            folder.write("file", b"new")
        monkeypatch.undo()
        assert folder.read("file") == b"old"
        assert folder.names() == ["file"]


def test_save_is_refused_early_when_it_cannot_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=2**18, f_frsize=4096, f_blocks=2**20))
    (tmp_path / "a").mkdir()
    check_room({tmp_path: 2**29})
    with pytest.raises(TransferFailed, match=r"1\.00 GiB free, and 1\.06 GiB"):
        check_room({tmp_path: 2**29, tmp_path / "a": 2**29})  # both are on one file system
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0))
    check_room({tmp_path: 2**29})
