"""Fixtures that all tests share: real servers, and a guard that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from hypothesis import settings

from gms_core.client import Session, connect
from gms_core.devices import DeviceId
from gms_core.runtime_dir import keeper_path, lock_path

# The same examples in every run, so that a change that breaks nothing fails nothing. To look further: pytest --hypothesis-profile=explore
# No example has a time limit: how long one takes says more about the machine.
settings.register_profile("repeatable", derandomize=True, print_blob=True, deadline=None)
settings.register_profile("explore", max_examples=2000, print_blob=True, deadline=None)
settings.load_profile("repeatable")

# A shell that runs the tests in the background ignores SIGINT for them, and so for every program that they start and want to end by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup does so with SIGHUP. What is caught here, to no effect, is not ignored by what is started from here.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

SERVE = """
import sys
from pathlib import Path
from gms_core.server.supervisor import serve
sys.exit(serve([sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]) or None, lambda device, path: print(path, flush=True)))
"""


@dataclass
class RunningServer:
    """A supervisor with one device server, as real processes."""

    device: DeviceId
    directory: Path
    supervisor: subprocess.Popen[str]

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.device}.sock"

    def connect(self, client: str = "test") -> Session:
        return connect(socket_path=self.socket, client=client)

    @property
    def pid(self) -> int:
        """The device server's process."""
        with self.connect() as session:
            return session.status().pid

    def wait_until_ready(self) -> None:
        """Wait until the supervisor says (again) that clients can connect."""
        assert self.supervisor.stdout is not None
        assert self.supervisor.stdout.readline().strip() == str(self.socket)

    def kill(self) -> None:
        """Kill the device server alone, and wait until there is another one, which goes on with everything."""
        os.kill(self.supervisor_child, signal.SIGKILL)
        self.wait_until_ready()

    def lose_everything(self) -> None:
        """Kill the device server and its keeper: there is another server then, which has nothing."""
        lose_everything(self.socket)
        self.wait_until_ready()

    @property
    def supervisor_child(self) -> int:
        """The device server's process, even if it does not answer."""
        return owner(self.socket)

    @property
    def keepers(self) -> list[int]:
        """Processes that keep what the device server has."""
        return keepers(self.socket)

    def stop(self) -> None:
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(signal.SIGTERM)
        assert self.supervisor.wait(20) == 0
        assert self.supervisor.stdout is not None
        self.supervisor.stdout.close()


def owner(path: Path) -> int:
    """The process of the device server of a socket, even if it does not answer."""
    while not (number := lock_path(path).read_text()):  # a new server is just putting its own there
        time.sleep(0.001)
    return int(number)


def end_keeper(path: Path) -> None:
    """End the keeper of the device server of a socket: the memory goes with the last process that has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
        keeper.settimeout(10)
        keeper.connect(os.fspath(keeper_path(path)))
        keeper.send(b"E")
        keeper.recv(1)


def lose_everything(path: Path) -> None:
    """Kill the device server of a socket, and its keeper."""
    server = owner(path)
    os.kill(server, signal.SIGSTOP)  # so that it does not start another keeper
    end_keeper(path)
    os.kill(server, signal.SIGKILL)


def keepers(path: Path) -> list[int]:
    """Living processes that keep what the device server of a socket has; of a directory: what any server in it has."""
    wanted = os.fsencode(path if path.is_dir() else keeper_path(path))
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if entry.name.isdecimal() and b"/keeper/process.py" in (command := (entry / "cmdline").read_bytes()):
                named = command.split(b"\0")[-3]
                if wanted in (named, os.path.dirname(named)) and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def running_server(directory: Path, device: str = "host", host_memory: int = 0) -> Iterator[RunningServer]:
    """A supervisor whose device server can be reached, until the context ends."""
    command = [sys.executable, "-c", SERVE, device, str(directory), str(host_memory)]
    server = RunningServer(DeviceId(device), directory, subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A short path: a socket's path has at most 107 bytes. When a test is over, nobody keeps memory for a server in it."""
    with tempfile.TemporaryDirectory(prefix="gms-") as directory:
        yield Path(directory)
        deadline = time.monotonic() + 10
        while left := keepers(Path(directory)):  # one that was told to end has answered before it is gone
            assert time.monotonic() < deadline, f"keepers left running: {left}"
            time.sleep(0.01)


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[RunningServer]:
    """A device server for the ``host`` device."""
    with running_server(runtime_dir) as running:
        yield running


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with the tests that may take longest: else one would be left with such a test at the end, and the others with nothing."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        usual = float(config.getini("timeout"))
        timeouts = {item: item.get_closest_marker("timeout") for item in items}
        items.sort(key=lambda item: -float(mark.args[0] if (mark := timeouts[item]) else usual))


MOST_LINES = 80
"""Of each stream that a failed test's report keeps: a server's log of many engines would bury what failed."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    report.sections = [(title, _end_of(text)) for title, text in report.sections]
    return report


def _end_of(text: str) -> str:
    lines = text.splitlines(keepends=True)
    left_out = len(lines) - MOST_LINES
    return text if left_out <= 0 else "".join([f"... {left_out} lines before this are left out\n", *lines[left_out:]])


def _descriptors() -> dict[str, str]:
    """Open descriptors and what they refer to, without the one that lists them."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
    return found


def _children() -> set[str]:
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(listing.read_text().split())


def _lasting() -> set[str]:
    """Python's resource tracker, which is started when it is first needed, and ends with this process."""
    return {str(resource_tracker._resource_tracker._pid)}  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a descriptor to memory, a socket or a process behind."""
    descriptors, children = _descriptors(), _children()
    yield
    left = {name: target for name, target in _descriptors().items() if name not in descriptors and ("memfd" in target or "socket" in target)}
    assert not left, f"descriptors left open: {left}"
    assert _children() <= children | _lasting(), "processes left running"
