"""The keeper: descriptors that outlive whoever handed them over, and a keeper that is replaced when it is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_core.errors import KeeperLost, PermissionRefused, QuotaExceeded
from gms_core.keeper import connection, process
from gms_core.keeper.connection import Keeper
from gms_core.keeper.keeping import Keeping
from gms_core.protocol.peer import connect

PATIENCE_S = 30.0


@pytest.fixture
def path(runtime_dir: Path) -> Iterator[Path]:
    """Where a keeper listens; it is ended with the test."""
    path, before = runtime_dir / "host.keep", children()
    yield path
    with contextlib.suppress(ProcessLookupError):
        for pid in keepers(path):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not keepers(path) and children() <= before)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def keepers(path: Path) -> list[int]:
    """Processes of keepers at a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(path) in words and os.fsencode(process.__file__) in words and (entry / "stat").read_text().split(") ")[-1][0] != "Z":
                    found.append(int(entry.name))
    return found


def until(condition, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        reap()
        time.sleep(0.01)
    reap()


def reap() -> None:
    """Reap children that have ended, and those that are about to: what has no words of its command any more ends by itself."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not any(map(is_ending, Path("/proc/self/task").glob("*/children"))):
            return
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_ending(children: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(not Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split())
    return False


@contextlib.contextmanager
def files(count: int) -> Iterator[dict[str, int]]:
    """Memory files by name, each with its name as its content."""
    found = {}
    try:
        for number in range(count):
            found[f"memory/{number}/4096"] = os.memfd_create("test")
            os.write(found[f"memory/{number}/4096"], f"memory/{number}/4096".encode())
        yield found
    finally:
        for descriptor in found.values():
            os.close(descriptor)


def contents(kept: dict[str, int]) -> dict[str, str]:
    """What is in descriptors, which are closed."""
    found = {}
    for name, descriptor in kept.items():
        found[name] = os.pread(descriptor, 64, 0).decode()
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    return found


@pytest.mark.parametrize("count", [0, 1, 253, 254, 1000])
def test_what_is_kept_outlives_whoever_handed_it_over(path: Path, count: int):
    first = Keeper(path, PATIENCE_S)
    assert first.label == ""
    with files(count) as handed:
        first.keep(handed)
        first.set_label("mine")
    first.close()
    second = Keeper(path, PATIENCE_S)
    assert second.label == "mine"
    assert contents(second.kept()) == {name: name for name in handed}
    second.drop([name for name in handed if "1" in name])
    assert contents(second.kept()) == {name: name for name in handed if "1" not in name}
    second.end()
    until(lambda: not keepers(path))
    assert not path.exists()


def test_what_is_dropped_is_closed(path: Path):
    keeper = Keeper(path, PATIENCE_S)
    read, write = os.pipe()
    keeper.keep({"pipe": write})
    os.close(write)
    keeper.drop(["pipe", "unknown"])
    assert os.read(read, 1) == b"", "somebody still has the other end"
    os.close(read)
    keeper.end()


def test_what_comes_twice_under_one_name_is_refused_and_closed(path: Path):
    keeper = Keeper(path, PATIENCE_S)
    read, write = os.pipe()
    with pytest.raises(QuotaExceeded):
        keeper._ask(b"Kpipe\npipe", [write, write])
    os.close(write)
    assert os.read(read, 1) == b"", "somebody still has the other end"
    os.close(read)
    assert keeper.kept() == {}
    keeper.end()


def test_same_name_again_replaces_what_was_there(path: Path):
    keeper = Keeper(path, PATIENCE_S)
    with files(2) as handed:
        one, two = handed.values()
        keeper.keep({"x": one})
        keeper.keep({"x": two})
    assert contents(keeper.kept()) == {"x": "memory/1/4096"}
    keeper.end()


def test_the_newest_connection_is_the_server_s(path: Path):
    old = Keeper(path, PATIENCE_S)
    new = Keeper(path, PATIENCE_S)
    with pytest.raises(KeeperLost):
        old.check()
    new.check()
    old.close()
    new.end()


def test_connection_that_says_nothing_changes_nothing(path: Path):
    keeper = Keeper(path, 0.5)
    with contextlib.ExitStack() as silent:
        for _ in range(40):
            one = silent.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connect(one, path, 10)
        keeper.check()
    keeper.check()
    (pid,) = keepers(path)
    until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 10)
    keeper.close()
    until(lambda: not keepers(path))


def test_server_waits_when_the_queue_of_its_keeper_is_full(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "QUEUE", 1)
    first = Keeper(path, PATIENCE_S)
    first.set_label("mine")
    (pid,) = keepers(path)
    os.kill(pid, signal.SIGSTOP)
    with contextlib.ExitStack() as waiting:
        with contextlib.suppress(BlockingIOError):
            while True:
                connect(waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)), path, 0.0)
        threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()
        second = Keeper(path, PATIENCE_S)
    assert second.label == "mine", "another keeper has taken the place of one that was busy"
    first.close()
    second.end()


def test_keeper_is_found_or_not_but_never_started_where_there_is_no_patience(path: Path):
    with pytest.raises(KeeperLost):
        Keeper(path)
    assert keepers(path) == []
    Keeper(path, PATIENCE_S).close()
    found = Keeper(path)
    assert not found.new
    found.end()
    until(lambda: not path.exists())
    connection.end_at(path)


def test_first_server_has_time_to_say_something_whatever_the_patience(path: Path):
    keeper = Keeper(path, 0.0)
    keeper.check()
    keeper.close()
    until(lambda: not keepers(path))


def test_it_ends_by_itself_when_nobody_comes_back(path: Path):
    keeper = Keeper(path, 0.3)
    read, write = os.pipe()
    keeper.keep({"pipe": write})
    os.close(write)
    keeper.close()
    assert os.read(read, 1) == b""
    os.close(read)
    until(lambda: not keepers(path) and not path.exists())


def test_it_has_no_time_limit_while_there_is_a_server(path: Path):
    keeper = Keeper(path, 0.1)
    time.sleep(0.5)
    keeper.check()
    keeper.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_another_keeper_takes_the_place_of_one_that_is_killed_or_hangs(path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "REPLY_S", 0.5)
    with files(300) as everything:
        keeping = Keeping(Keeper(path, PATIENCE_S), lambda: Keeper(path, PATIENCE_S), "label")
        keeping.everything = lambda: everything
        (first,) = keepers(path)
        os.kill(first, number)
        keeping.check()
        keeping.keep({})
        with files(1) as more:
            keeping.keep({"more": next(iter(more.values()))})
        keeping.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL)
    again = Keeper(path, PATIENCE_S)
    assert again.label == "label"
    assert contents(again.kept()) == {**{name: name for name in everything}, "more": "memory/0/4096"}
    again.end()


def test_it_needs_nothing_of_an_installation(path: Path):
    """An upgrade may remove every file of the package while it runs."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, process.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "gms_core" not in done.stdout
    assert "msgspec" not in done.stdout


def test_keeper_that_cannot_be_started_is_told(runtime_dir: Path):
    os.chmod(runtime_dir, 0o700)
    with pytest.raises((KeeperLost, PermissionRefused)):
        Keeper(runtime_dir / "missing" / "host.keep", PATIENCE_S)
