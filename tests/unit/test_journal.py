"""The journal: what was acknowledged is read back, whatever a kill tears; what is damaged is never taken for the truth."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.errors import JournalDamaged, JournalUnavailable
from gms_core.server import journal as module
from gms_core.server.journal import Journal

NAMES = st.sampled_from(["a", "b/1", "b/2", "c"])
CHANGES = st.dictionaries(NAMES, st.none() | st.binary(max_size=200), min_size=1, max_size=4)


def applied(batches):
    values = {}
    for changes in batches:
        for name, value in changes.items():
            if value is None:
                values.pop(name, None)
            else:
                values[name] = value
    return values


@given(st.lists(CHANGES, max_size=20), st.booleans())
def test_values_are_read_back_after_any_changes(tmp_path_factory, batches, synced):
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    for changes in batches:
        journal.reserve()
        journal.append(changes, synced=synced)
    journal.close()
    again = Journal(path)
    assert again.values == journal.values == applied(batches)
    again.append({"more": b"1"})
    again.close()
    last = Journal(path)
    assert last.values == {**applied(batches), "more": b"1"}
    last.close()


@given(st.lists(CHANGES, min_size=1, max_size=6), CHANGES, st.data())
def test_record_that_a_kill_has_torn_is_left_out_and_what_comes_after_it_is_right(tmp_path_factory, batches, last, data):
    """A kill leaves a prefix of the last record, and, since the kernel writes by pages, maybe zeros in its place."""
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    for changes in batches:
        journal.append(changes)
    before = journal._end
    journal.append(last)
    end = journal._end
    journal.close()
    kept = data.draw(st.integers(before, end - 1))
    with path.open("r+b") as file:
        file.seek(kept)
        file.write(bytes(end - kept))
    whole = path.read_bytes()[before:end] == module._record(last)
    again = Journal(path)
    expected = applied([*batches, last]) if whole else applied(batches)
    assert again.values == expected
    again.append({"x": b"new"})
    again.close()
    third = Journal(path)
    assert third.values == {**expected, "x": b"new"}
    third.close()


@given(st.lists(CHANGES, min_size=2, max_size=6), st.data())
def test_damage_before_the_last_record_is_told(tmp_path_factory, batches, data):
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    ends = []
    for changes in batches:
        journal.append(changes)
        ends.append(journal._end)
    journal.close()
    at = data.draw(st.integers(0, ends[-2] - 1))
    content = bytearray(path.read_bytes())
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(JournalDamaged):
        Journal(path)
    assert path.read_bytes() == bytes(content), "a damaged journal is left as it is"


def test_something_else_is_no_journal(tmp_path: Path):
    path = tmp_path / "j"
    path.write_bytes(b"something else")
    with pytest.raises(JournalDamaged):
        Journal(path)
    journal = Journal.replacing(path)
    journal.append({"a": b"1"})
    journal.close()
    assert (tmp_path / "j").with_suffix(".damaged").read_bytes() == b"something else"


def test_link_is_not_followed(tmp_path: Path):
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "j").symlink_to(tmp_path / "target")
    with pytest.raises(JournalUnavailable):
        Journal(tmp_path / "j")


def test_it_does_not_grow_with_changes_but_with_values(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    for number in range(20_000):
        journal.reserve()
        journal.append({"counter": str(number).encode() * 20})
    assert (tmp_path / "j").stat().st_size < 4 * module.COMPACT_FROM
    assert journal.values == {"counter": b"19999" * 20}
    journal.close()


class Full:
    """A disk that is full whenever it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.breaks = False
        fallocate, pwrite, fdatasync = os.posix_fallocate, os.pwrite, os.fdatasync

        def maybe(call):
            def wrapped(*arguments):
                if self.full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return call(*arguments)

            return wrapped

        def broken(*arguments):
            if self.breaks:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return fdatasync(*arguments)

        monkeypatch.setattr(module.os, "posix_fallocate", maybe(fallocate))
        monkeypatch.setattr(module.os, "pwrite", pwrite)
        monkeypatch.setattr(module.os, "fdatasync", broken)


def test_full_disk_refuses_what_is_large_and_still_takes_what_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Full(monkeypatch)
    journal = Journal(tmp_path / "j")
    journal.append({"a": b"1"})
    disk.full = True
    with pytest.raises(JournalUnavailable, match="No space left"):
        journal.reserve(10 * 2**20)
    assert journal.values == {"a": b"1"}
    for number in range(100):  # such as the ends of processes, which cannot be refused
        journal.append({"a": str(number).encode()})
    disk.full = False
    journal.reserve(10 * 2**20)
    journal.append({"b": bytes(10 * 2**20)})
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.values == {"a": b"99", "b": bytes(10 * 2**20)}
    again.close()


def test_disk_that_fails_is_written_anew_once_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Full(monkeypatch)
    journal = Journal(tmp_path / "j")
    journal.append({"a": b"1"}, synced=True)
    disk.breaks = True
    with pytest.raises(JournalUnavailable):
        journal.append({"a": b"2"}, synced=True)
    with pytest.raises(JournalUnavailable):
        journal.reserve()
    disk.breaks = False
    journal.reserve()
    journal.append({"b": b"3"}, synced=True)
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.values == {"a": b"2", "b": b"3"}
    again.close()


def test_compaction_whose_directory_cannot_be_synced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal = Journal(tmp_path / "j")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_sync_directory", broken)
        for number in range(200):
            with contextlib.suppress(JournalUnavailable):  # once it has tried to compact itself
                journal.append({"a": bytes([number]) * 20_000})
    journal.append({"b": b"acknowledged"}, synced=True)
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.values == {"a": bytes([199]) * 20_000, "b": b"acknowledged"}
    again.close()
