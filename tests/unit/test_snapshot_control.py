"""Sentinels: what an orchestrator reads, and what it is told when they cannot be written."""

import os
import stat
import threading

import pytest

from gms_core.errors import SnapshotBusy, SnapshotDamaged
from gms_core.snapshot import control as module
from gms_core.snapshot.control import Control
from tests.unit.sentinels import read_sentinels


def test_sentinels_follow_one_another_when_a_save_goes_well(tmp_path):
    control = Control(tmp_path / "control", "model", "save")
    control.begin()
    (saving,) = read_sentinels(tmp_path / "control", "model").values()
    assert (saving.state, saving.version, saving.pid) == ("SAVING", 0, os.getpid())
    control.about(3, "0123456789abcdef")
    control.done()
    assert control.close() is None
    (saved,) = read_sentinels(tmp_path / "control", "model").values()
    assert (saved.state, saved.name, saved.version, saved.id, saved.doing) == ("SAVED", "model", 3, "0123456789abcdef", "save")
    assert os.listdir(tmp_path / "control/model") == ["SAVED"]
    assert stat.S_IMODE((tmp_path / "control/model/SAVED").stat().st_mode) & 0o044 == 0o044, "who watches is another user"


def test_everybody_may_read_sentinels_when_the_umask_forbids_it(tmp_path):
    before = os.umask(0o077)
    try:
        with Control(tmp_path / "control", "model", "save") as control:
            control.begin()
            control.done()
    finally:
        os.umask(before)
    for path, mode in (("control", 0o755), ("control/model", 0o755), ("control/model/SAVED", 0o644)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode, path


def fail(directory, doing, error):
    """The sentinels that are there while something goes on that fails."""
    found = set()

    def work():
        with Control(directory, "model", doing) as control:
            control.begin()
            found.update(read_sentinels(directory, "model"))
            raise error

    with pytest.raises(type(error)):
        work()
    return found


def test_reason_is_told_when_a_save_fails(tmp_path):
    with Control(tmp_path, "model", "save") as control:
        control.begin()
        control.done()
    assert fail(tmp_path, "save", SnapshotDamaged("block 7 is wrong", hint="Save anew.")) == {"SAVING"}
    (failed,) = read_sentinels(tmp_path, "model").values()
    assert (failed.state, failed.code, failed.message, failed.hint) == ("FAILED", "snapshot_damaged", "block 7 is wrong", "Save anew.")


def test_saved_stays_when_a_restore_begins_and_fails(tmp_path):
    with Control(tmp_path, "model", "save") as control:
        control.begin()
        control.done()
    assert fail(tmp_path, "restore", KeyboardInterrupt()) == {"SAVED", "RESTORING"}
    found = read_sentinels(tmp_path, "model")
    assert set(found) == {"SAVED", "FAILED"}
    assert "interrupted" in found["FAILED"].message
    with Control(tmp_path, "model", "restore") as control:
        control.begin()
        control.done()
    assert set(read_sentinels(tmp_path, "model")) == {"SAVED", "RESTORED"}


def test_work_goes_on_and_it_is_told_when_sentinels_cannot_be_written(tmp_path):
    (tmp_path / "control").write_text("a file")
    control = Control(tmp_path / "control", "model", "save")
    control.begin()
    control.done()
    assert "control" in str(control.close())


def test_work_goes_on_and_it_is_told_when_the_volume_does_not_answer(tmp_path, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "write_sentinel", lambda *_: answers.wait())
    control = Control(tmp_path, "model", "save")
    control.begin()
    control.done()
    thread = control._thread
    assert "does not answer" in str(control.close())
    answers.set()
    thread.join()


def test_nothing_is_written_when_there_is_no_directory():
    with Control(None, "model", "save") as control:
        control.begin()
        control.done()
        assert control.close() is None


def test_second_save_is_refused_when_the_first_one_still_tells_of_the_name(tmp_path):
    with Control(tmp_path, "model", "save") as first:
        first.alone()
        first.begin()

        def second():
            with Control(tmp_path, "model", "save") as control:
                control.alone()

        with pytest.raises(SnapshotBusy, match="another save tells of snapshot 'model'"):
            second()
        assert read_sentinels(tmp_path, "model").keys() == {"SAVING"}
        with Control(tmp_path, "other", "save") as other:
            other.alone()
        first.done()
    with Control(tmp_path, "model", "save") as third:
        third.alone()
    assert os.listdir(tmp_path / "model") == ["SAVED"]
