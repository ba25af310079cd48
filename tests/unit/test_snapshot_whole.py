"""A whole save and its sentinels: they are of whoever has the name, and tell what has become of the snapshot."""

import os
import signal

import pytest

from gms_core.errors import GmsError, SnapshotBusy, TransferCancelled
from gms_core.snapshot.catalogue import entries
from gms_core.snapshot.config import SnapshotConfig
from gms_core.snapshot.control import Control
from gms_core.snapshot.staging import Staging
from gms_core.snapshot.whole import Place, restore_snapshot, save_snapshot
from tests.unit.publishing import publish
from tests.unit.snapshot_stand_in import roots_in


@pytest.fixture
def config(tmp_path):
    roots_in(tmp_path, 1)
    return SnapshotConfig(roots=(tmp_path / "root0",), control_dir=tmp_path / "control")


@pytest.fixture
def place(server):
    with server.connect() as session:
        publish(session, b"x" * 4096).release()
        yield Place("host", server.socket, "weights")


def sentinels(tmp_path):
    return sorted(os.listdir(tmp_path / "control/model"))


def ignore(*_):
    pass


def test_sentinels_of_the_first_saver_stay_when_a_second_one_is_refused(place, config, tmp_path):
    with Staging.begin(roots_in(tmp_path, 1), "model") as staging:
        control = Control(config.control_dir, "model", "save")
        control.about(staging.target.plan.version, staging.target.plan.id)
        control.begin()
        saving = (tmp_path / "control/model/SAVING").read_bytes()
        with pytest.raises(SnapshotBusy):
            save_snapshot(lambda: [place], "model", config, ignore)
        assert sentinels(tmp_path) == ["SAVING"]
        assert (tmp_path / "control/model/SAVING").read_bytes() == saving
        control.close()


def test_failure_is_told_when_a_save_is_refused_before_it_begins(place, config, tmp_path):
    with pytest.raises(GmsError):
        save_snapshot(lambda: [place], "model", config.model_copy(update={"backend": "nobody-has-this"}), ignore)
    assert sentinels(tmp_path) == ["FAILED"]


def test_failure_is_told_while_the_name_is_locked_when_a_save_fails(place, config, tmp_path, monkeypatch):
    """The last one is written before another process may begin."""
    held = []
    real = Control.fail

    def fail(control, error):
        held.append(entries(roots_in(tmp_path, 1))[0].state)
        real(control, error)

    monkeypatch.setattr(Control, "fail", fail)
    with pytest.raises(GmsError):
        save_snapshot(lambda: [place._replace(pool="nothing")], "model", config, ignore)
    assert held[0] == "saving"
    assert sentinels(tmp_path) == ["FAILED"]


def test_snapshot_is_told_when_the_signal_to_end_comes_after_it(place, config, tmp_path, monkeypatch):
    real = Control.done

    def done(control):
        os.kill(os.getpid(), signal.SIGTERM)
        real(control)

    monkeypatch.setattr(Control, "done", done)
    assert save_snapshot(lambda: [place], "model", config, ignore).manifest.version == 1
    assert sentinels(tmp_path) == ["SAVED"]
    outcome = restore_snapshot("model", config, lambda _: [place._replace(pool="copy")], ignore, timeout_s=5, memory_timeout_s=5)
    assert [done.generation for _, done in outcome.images] == [1]
    assert sentinels(tmp_path) == ["RESTORED", "SAVED"]


def test_failure_is_told_when_the_signal_to_end_comes_before_the_commit(place, config, tmp_path, monkeypatch):
    real = Staging.commit

    def commit(staging, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(staging, images)

    monkeypatch.setattr(Staging, "commit", commit)
    with pytest.raises(TransferCancelled):
        save_snapshot(lambda: [place], "model", config, ignore)
    assert sentinels(tmp_path) == ["FAILED"]
    assert entries(roots_in(tmp_path, 1))[0].state == "failed"
