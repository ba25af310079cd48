"""What a loss of power leaves is what was synced: everything is, before a name says that it is there."""

import os

from gms_core.snapshot.manifest import BLOCK_BYTES
from tests.unit.publishing import PAGE, publish
from tests.unit.snapshot_stand_in import roots_in, save_pool


def record(monkeypatch):
    """What is synced and renamed, in this order: the call and the path, of a file that is renamed the new one."""
    calls = []

    def path_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def sync(descriptor, _real=real, _name=name):
            _real(descriptor)
            calls.append((_name, path_of(descriptor)))

        monkeypatch.setattr(os, name, sync)
    real_rename = os.rename

    def rename(old, new, *, src_dir_fd, dst_dir_fd):
        real_rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        calls.append(("rename", f"{path_of(dst_dir_fd)}/{new}"))

    monkeypatch.setattr(os, "rename", rename)
    return calls


def test_everything_is_synced_before_a_name_says_so_when_a_snapshot_is_saved(server, tmp_path, monkeypatch):
    roots = roots_in(tmp_path)
    with server.connect() as session, publish(session, os.urandom(PAGE) + bytes(2 * BLOCK_BYTES), slab=64 * PAGE) as lease:
        calls = record(monkeypatch)
        save_pool(session, lease, roots)
    named = [str(root.path / "model") for root in roots]
    whole = [f"{folder}/1" for folder in named]
    renames = [calls.index(("rename", folder)) for folder in reversed(whole)]  # the first root is renamed last
    assert renames == sorted(renames)

    shards = sorted(str(path) for path in tmp_path.glob("root*/model/1/images/0/*.shard"))
    assert len(shards) == 2
    synced = [(name, path.replace(staging, folder)) for (name, path) in calls[: renames[0]] for staging, folder in [_places(path, named, whole)]]
    last_shard = max(synced.index(("fdatasync", shard)) for shard in shards)
    for folder in whole:
        for below in ("", "/images", "/images/0"):
            assert ("fsync", folder + below) in synced[last_shard:], folder + below
        assert ("rename", f"{folder}/part.json") in synced

    for number, folder in zip(renames, reversed(named), strict=True):
        assert calls[number + 1] == ("fsync", folder)

    inside = whole[0]
    after = calls[renames[-1] + 2 :]
    steps = [(name, _final(path)) for name, path in after[:6]]
    assert steps == [
        ("fsync", f"{inside}/manifest.json"),
        ("rename", f"{inside}/manifest.json"),
        ("fsync", inside),
        ("fsync", f"{inside}/COMMITTED"),
        ("rename", f"{inside}/COMMITTED"),
        ("fsync", inside),
    ]


def test_name_of_a_root_is_synced_when_it_is_made(tmp_path, monkeypatch):
    calls = record(monkeypatch)
    roots_in(tmp_path, 1)
    assert calls[0] == ("fsync", str(tmp_path))
    assert ("fsync", str(tmp_path / "root0")) in calls


def _places(path, named, whole):
    """The staging folder that a path is in, and the one that it becomes."""
    for folder, becomes in zip(named, whole, strict=True):
        if path.startswith(f"{folder}/.staging-"):
            return f"{folder}/{path.removeprefix(folder + '/').split('/')[0]}", becomes
    return "\0", ""


def _final(path):
    """The file that a temporary one becomes."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name[1:].rpartition('-')[0]}" if name.startswith(".") else path
