"""A stand-in for systemd as one service sees it: a socket for notifications, and a descriptor store with systemd's rules (service.c, manager.c)."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gms_core.config import child_environment

NOTE_BYTES = 4096
FIRST = 3
_F_DUPFD_QUERY = 1027
_STARTED_AS_MAIN = """
import fcntl, os, sys
numbers = [int(word) for word in sys.argv[1].split(",") if word]
high = [fcntl.fcntl(number, fcntl.F_DUPFD, 100 + len(numbers)) for number in numbers]
for index, number in enumerate(high):
    os.dup2(number, 3 + index)
os.closerange(3 + len(high), 100 + 3 * len(numbers) + 100)
os.environ["SYSTEMD_EXEC_PID"] = str(os.getpid())
if numbers:
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass
class StandIn:
    """The manager of one service: ``FileDescriptorStoreMax=most``, ``FileDescriptorStorePreserve=restart``, ``NotifyAccess=main``.

    Attributes:
        store: Names and descriptors that it keeps, the newest first, as systemd prepends to its list.
        told: Notes without descriptors, in order.
        dropped: How many descriptors it has closed without telling anybody.
    """

    address: str
    most: int
    store: list[tuple[str, int]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    dropped: int = 0
    main: int = 0
    service: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._wake, self._end = os.pipe()
        self._looks = threading.Lock()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.store]

    @property
    def memory(self) -> list[str]:
        """Names of what is kept of allocations."""
        return [name for name in self.names if "/memory/" in name]

    def variables(self) -> dict[str, str]:
        passed = {"LISTEN_FDS": str(len(self.store)), "LISTEN_FDNAMES": ":".join(self.names)} if self.store else {}
        return {"NOTIFY_SOCKET": self.address, "FDSTORE": str(self.most), **passed}

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        """Start the service with what is kept."""
        numbers = [number for _, number in self.store]
        self.told.clear()
        with self._looks:
            self.service = subprocess.Popen(
                [sys.executable, "-c", _STARTED_AS_MAIN, ",".join(map(str, numbers)), *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=numbers,
                env=child_environment(**{**self.variables(), **environment}),
                start_new_session=True,
            )
            self.main = self.service.pid
        return self.service

    def wait_until_told(self, note: str) -> None:
        assert self.service is not None
        deadline = time.monotonic() + 30
        while note not in self.told:
            assert self.service.poll() is None, self._said()
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.01)

    def _said(self) -> str:
        assert self.service is not None
        self.service.kill()
        return self.service.communicate(timeout=20)[1]

    def kill(self, but: Sequence[int] = ()) -> None:
        """Kill all processes of the service at once, as far as any of them can tell."""
        assert self.service is not None
        everybody = [pid for pid in (*descendants(self.service.pid), self.service.pid) if pid not in but]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in everybody:
                os.kill(pid, number)
        self._wait()

    def restart_begins(self) -> None:
        """``systemctl restart``, up to the next start: SIGTERM to all processes; what is kept stays."""
        assert self.service is not None
        for pid in [self.service.pid, *descendants(self.service.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._wait()

    def stop(self) -> None:
        """``systemctl stop``: the same, and then what is kept is closed."""
        self.restart_begins()
        with self._looks:
            self._forget(lambda name: True)

    def reload(self, most: int) -> None:
        """``systemctl daemon-reload`` with another maximum: it writes its list down, and keeps each entry anew, as far as they fit."""
        with self._looks:
            written, self.store, self.most = self.store, [], most
            for name, number in written:
                self._add(name, number)

    def _wait(self) -> None:
        assert self.service is not None
        self.service.communicate(timeout=20)
        self.service = None

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It looks at nothing meanwhile."""
        with self._looks:
            yield

    def close(self) -> None:
        if self.service is not None:
            if self.service.poll() is None:
                self.kill()
            else:
                self._wait()
        os.close(self._end)
        self._thread.join()
        self._forget(lambda name: True)
        self._socket.close()
        os.close(self._wake)

    def _work(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(self._socket, select.POLLIN)
            ready = {number for number, _ in poll.poll()}
            if self._wake in ready:
                return
            with self._looks:
                self._look()

    def _look(self) -> None:
        room = socket.CMSG_SPACE(struct.calcsize("3i")) + socket.CMSG_SPACE(768 * 4)
        data, ancillary, flags, _ = self._socket.recvmsg(NOTE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        numbers, sender = array.array("i"), 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(content)
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                sender = struct.unpack("3i", content)[0]
        lines = data.decode().split("\n")
        left = list(numbers)
        if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) and "BARRIER=1" not in lines and sender == self.main:
            self._obey(lines, left)
        for number in left:
            os.close(number)

    def _obey(self, lines: list[str], numbers: list[int]) -> None:
        values = dict(line.split("=", 1) for line in lines)
        name = values.get("FDNAME", "stored")
        if len(name) > 255 or not name.isascii() or not name.isprintable() or ":" in name:
            name = "stored"
        if values.get("FDSTOREREMOVE") == "1":
            self._forget(lambda other: other == name)
        elif values.get("FDSTORE") == "1":
            assert values.get("FDPOLL") == "0", "systemd would close what reports an error"
            while numbers:
                self._add(name, numbers.pop(0))
        else:
            self.told.extend(lines)

    def _add(self, name: str, number: int) -> None:
        if len(self.store) >= self.most:
            self.dropped += 1
        elif not any(same_file(number, other) for _, other in self.store):
            self.store.insert(0, (name, number))
            return
        os.close(number)

    def _forget(self, unwanted: Any) -> None:
        for name, number in self.store:
            if unwanted(name):
                os.close(number)
        self.store = [(name, number) for name, number in self.store if not unwanted(name)]


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of one open file; where the kernel cannot be asked (before Linux 6.10), of one inode."""
    try:
        return bool(fcntl.fcntl(one, _F_DUPFD_QUERY, other))
    except OSError:
        return os.path.samestat(os.fstat(one), os.fstat(other))


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for word in (task / "children").read_text().split():
            found += [int(word), *descendants(int(word))]
    return found
