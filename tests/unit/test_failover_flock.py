"""The lock file, with real processes that die, fork, and lose their file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gms_core.errors import ConfigurationError, SessionClosed
from gms_core.failover.flock import FileLock, read_owner
from gms_core.failover.locks import last_owner, open_lock
from gms_core.failover.process import EngineProcess
from gms_core.failover.server_lock import ServerLock, lock_file
from tests.unit.failover_processes import LOCKER, Told, told_processes

ME = EngineProcess("c0ffee", "engine-1", "api-server 0", ())
Start = Callable[..., Told]
OPEN_AS_NOBODY = """
import os, sys
from pathlib import Path
from gms_core.failover.flock import FileLock
if os.getuid() == 0:
    os.setuid(65534)
FileLock(Path(sys.argv[1])).open()
"""


@pytest.fixture
def start() -> Iterator[Start]:
    with told_processes() as begin:
        yield lambda path, engine: begin(LOCKER, path, engine)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_second_is_elected_with_the_next_term_when_the_first_is_killed(start: Start, path: Path) -> None:
    first = start(path, "engine-1")
    assert first.until_key("term") == 1
    second = start(path, "engine-2")
    waits = second.until_key("waits")
    assert f"engine-1 (pid {first.pid} on " in waits
    assert str(path) in waits
    first.kill()
    assert second.until_key("term") == 2
    owner = read_owner(path)
    assert owner is not None
    assert (owner.engine, owner.cohort, owner.pid, owner.term) == ("engine-2", "cohort of engine-2", second.pid, 2)


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_lock_ends_with_its_process_when_a_child_of_it_lives_on(start: Start, path: Path, way: str) -> None:
    first = start(path, "engine-1")
    first.until_key("term")
    first.tell(way)
    child = first.until_key("child")
    second = start(path, "engine-2")
    second.until_key("waits")
    first.kill()
    try:
        assert second.until_key("term") == 2
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("change", ["replace", "unlink"])
def test_the_file_that_the_path_names_is_locked_when_it_was_changed_while_it_was_waited_for(start: Start, path: Path, change: str) -> None:
    first = start(path, "engine-1")
    first.until_key("term")
    second = start(path, "engine-2")
    second.until_key("waits")
    if change == "replace":
        other = path.with_name("other")
        other.write_text(json.dumps({"engine": "engine-0", "cohort": "x", "pid": 1, "host": "h", "term": 41, "since": 0.0}) + "\n")
        other.rename(path)
    else:
        path.unlink()
    first.kill()
    assert second.until_key("term") == (42 if change == "replace" else 1)
    third = start(path, "engine-3")
    assert "engine-2" in third.until_key("waits")


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe garbage", b"{}", b"[1, 2]\n", b'{"term": 12', b"\0" * 9000, b'{"engine":"e","cohort":"c","pid":1,"host":"h","term":-4,"since":0}'],
)
def test_terms_begin_again_and_the_owner_is_whole_when_the_file_holds_garbage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_owner(path) is None
    lock = FileLock(path)
    assert lock.acquire(ME) == 1
    owner = read_owner(path)
    assert owner is not None
    assert (owner.engine, owner.term) == ("engine-1", 1)
    assert path.read_bytes().count(b"\n") == 1
    lock.close()


def test_term_goes_on_when_only_the_first_line_is_whole(path: Path) -> None:
    # As a process leaves it that dies between writing its line and cutting off what is left of a longer one.
    path.write_bytes(b'{"engine":"e","cohort":"c","pid":1,"host":"h","term":6,"since":0}\nnd":"x","term":5}\n')
    lock = FileLock(path)
    assert lock.acquire(ME) == 7
    assert path.read_bytes().count(b"\n") == 1
    lock.close()


def test_term_is_at_least_what_is_asked_when_the_file_knows_less(path: Path) -> None:
    for least, term in ((5, 5), (2, 6), (7, 7)):
        lock = FileLock(path)
        assert lock.acquire(ME, at_least=least) == term
        lock.close()


def test_waiting_thread_ends_without_the_lock_when_it_was_closed(path: Path) -> None:
    holder, waiter, caught, waiting = FileLock(path), FileLock(path), list[SessionClosed](), threading.Event()
    holder.acquire(ME)

    def wait() -> None:
        try:
            waiter.acquire(ME, lambda _: waiting.set())
        except SessionClosed as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    waiter.close()
    holder.close()
    thread.join(60)
    assert len(caught) == 1
    third = FileLock(path)
    assert third.acquire(ME, lambda reason: pytest.fail(reason)) == 2
    third.close()


def test_lock_is_of_no_use_when_it_was_closed(path: Path) -> None:
    lock = FileLock(path)
    lock.open()
    lock.close()
    lock.close()
    with pytest.raises(SessionClosed):
        lock.acquire(ME)


def test_open_fails_with_a_sentence_when_the_path_cannot_be_a_lock(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(tmp_path / "elsewhere")
    for wrong in (tmp_path / "nowhere" / "lock", fifo, link, tmp_path):
        with pytest.raises(ConfigurationError, match=f"the lock file {wrong} "):
            FileLock(wrong).open()
    assert not (tmp_path / "elsewhere").exists()


def test_open_is_refused_when_the_file_is_not_this_users(path: Path) -> None:
    path.touch(0o000)
    done = subprocess.run([sys.executable, "-c", OPEN_AS_NOBODY, path], capture_output=True, text=True)
    assert "PermissionRefused: the lock file" in done.stderr


def test_lock_is_made_from_its_text_when_a_configuration_names_it(path: Path) -> None:
    lock = open_lock(f"flock:{path}")
    assert isinstance(lock, FileLock)
    assert path.stat().st_mode & 0o777 == 0o600
    lock.close()
    assert isinstance(open_lock("gms:primary"), ServerLock)
    for wrong in ("", "gms:", "flock:relative", "etcd:x"):
        with pytest.raises(ConfigurationError, match="is no lock"):
            open_lock(wrong)


def test_last_owner_is_found_when_the_lock_is_a_file_or_a_servers(tmp_path: Path) -> None:
    socket = tmp_path / "GPU-1.sock"
    for text, file in ((f"flock:{tmp_path}/l", tmp_path / "l"), ("gms:a", lock_file(socket, "a"))):
        assert last_owner(text, socket) is None
        lock = FileLock(file)
        lock.acquire(ME)
        owner = last_owner(text, socket)
        assert owner is not None
        assert owner.cohort == "c0ffee"
        lock.close()
