"""What is done to a device server and its clients, and undone: a kind each, dealt by a seed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gms_core.client import WriteLease
from gms_core.errors import GmsError
from gms_core.layout import Identity
from gms_core.protocol.framing import encode
from gms_core.protocol.messages import PROTOCOL_VERSIONS, Acquire, Hello, Status
from tests.conftest import RunningServer

LARGEST_ALLOCATION = 8 * 4096
"""Bytes of a client's allocation, at most. A limit of files' sizes is above it: a ``host`` allocation is a file to the kernel."""
DISK_BYTES = 8 * 2**20


class Client(Protocol):
    """A client's process, as far as faults go."""

    @property
    def pid(self) -> int: ...


@dataclass
class Scene:
    """Whom a fault can hit.

    Attributes:
        clients: Leaders of process groups.
        replace: Starts another client in the place of one that was killed.
        disk: A small file system that the runtime directory is on; None where none could be mounted.
        kills: Of the server, until now.
        due: Whether the server was killed, and has not been waited for yet.
        events: What was done, in the words of `chaos.history`.
    """

    server: RunningServer
    chance: random.Random
    clients: list[Client]
    replace: Callable[[int], None]
    disk: Path | None = None
    kills: int = 0
    due: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def told(self, fault: str, **facts: object) -> Iterator[None]:
        """Note a fault, from before it to after it is undone."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.events.append({"client": "", "kind": "fault", "fault": fault, "began": began, "ended": time.monotonic(), **facts})

    def last(self) -> None:
        """Let a fault last for a while; now and then the server is killed meanwhile."""
        time.sleep(self.chance.uniform(0.05, 0.8))
        if self.chance.random() < 0.25:
            self.kill_server()

    def kill_server(self) -> None:
        """Kill the server. `wait_until_ready` is due once it can start again."""
        self.kills += 1
        os.kill(self.server.supervisor_child, signal.SIGKILL)
        self.due = True

    def wait_until_ready(self) -> None:
        """Wait until a server that was killed is there again."""
        if self.due:
            self.server.wait_until_ready()
            self.due = False

    def processes(self) -> list[int]:
        """The clients, and the engines that they have started."""
        found = []
        for client in self.clients:
            found.append(client.pid)
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split())
        return found


def kill_server(scene: Scene) -> None:
    """SIGKILL for the server."""
    with scene.told("kill server"):
        scene.kill_server()


def kill_client(scene: Scene) -> None:
    """SIGKILL for a client in whatever it does, with its engine or without, or for an engine."""
    number = scene.chance.randrange(len(scene.clients))
    pid = scene.clients[number].pid
    whom = scene.chance.choice(["all", "client", "engine"])
    family = [one for one in scene.processes() if one == pid or _parent(one) == pid]
    victims = family if whom == "all" else [pid] if whom == "client" else family[1:]
    with scene.told("kill client", pids=victims):
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        if pid in victims:
            scene.replace(number)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def stop_client(scene: Scene) -> None:
    """SIGSTOP for some clients and engines, and SIGCONT after a while."""
    running = scene.processes()
    victims = scene.chance.sample(running, scene.chance.randint(1, len(running)))
    with scene.told("stop client"):
        _stopped(scene, victims)


def stop_server(scene: Scene) -> None:
    """SIGSTOP for the server, and SIGCONT after a while."""
    with scene.told("stop server"):
        _stopped(scene, [scene.server.supervisor_child])


def stop_keeper(scene: Scene) -> None:
    """SIGSTOP for the keeper, and SIGCONT after a while."""
    with scene.told("stop keeper"):
        _stopped(scene, scene.server.keepers)


def _stopped(scene: Scene, victims: list[int]) -> None:
    pidfds = []
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))

    def send(number: int) -> None:
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)

    try:
        send(signal.SIGSTOP)
        scene.last()
    finally:
        send(signal.SIGCONT)
        for pidfd in pidfds:
            os.close(pidfd)


def tear(scene: Scene) -> None:
    """Some clients and engines cut their own connections, each at a byte that is left to chance."""
    running = scene.processes()
    with scene.told("tear"):
        for pid in scene.chance.sample(running, scene.chance.randint(1, len(running))):
            if _answers_tears(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)


def _answers_tears(pid: int) -> bool:
    """Whether a process has got as far as to deal with the signal, which would end it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


def vanish(scene: Scene) -> None:
    """Strangers come, and go in the middle of a frame, or between a request and its reply, or with the reply unread."""
    requests = [Status(), Acquire("weights", "ro", Identity(), 30.0), Acquire("weights", "rw", Identity({"content": "abc"}), 30.0)]
    with scene.told("vanish"):
        for _ in range(20):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(os.fspath(scene.server.socket))
                hello = encode(Hello(PROTOCOL_VERSIONS, "stranger"))
                if scene.chance.random() < 0.3:
                    connection.send(hello[: scene.chance.randrange(len(hello))])
                    continue
                connection.sendall(hello)
                if scene.chance.random() < 0.7:
                    connection.recv(4096)
                frame = encode(scene.chance.choice(requests))
                connection.sendall(frame[: scene.chance.choice([len(frame), scene.chance.randrange(len(frame))])])
                if scene.chance.random() < 0.3:
                    connection.shutdown(socket.SHUT_WR)


def limit_journal(scene: Scene) -> None:
    """No file of the server may be as long as its journal is: the kernel refuses to make it longer. That needs no privilege."""
    with scene.told("journal limit"):
        pid = scene.server.supervisor_child
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (LARGEST_ALLOCATION, hard))
        scene.last()
        with contextlib.suppress(ProcessLookupError):  # it was killed, and the next one has no such limit
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
        _until_written(scene)


def fill_disk(scene: Scene) -> None:
    """The file system of the runtime directory is full."""
    assert scene.disk is not None
    filling = scene.disk / "filling"
    with scene.told("full disk"):
        with filling.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            scene.last()
        filling.unlink()
        _until_written(scene)


def _until_written(scene: Scene) -> None:
    """Wait until the server can write again what it has to write before it grants anything."""
    scene.wait_until_ready()
    deadline = time.monotonic() + 30
    while True:
        try:
            scene.server.connect("checker").close()  # a session is written down
        except GmsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def hog_memory(scene: Scene) -> None:
    """Somebody has all memory but a little, and gives it back after a while."""
    with scene.told("memory hog"):
        with scene.server.connect("hog") as session:
            free, page = session.status().memory_free, session.welcome.granularity
            with contextlib.suppress(GmsError):  # others were faster
                lease = session.acquire("hog", "rw", Identity(), timeout_s=10, slab_bytes=page, memory_timeout_s=0)
                assert isinstance(lease, WriteLease)
                lease.arena.reserve_exact(max(page, free - scene.chance.randrange(8) * page))
                scene.last()
                scene.wait_until_ready()
                lease.release()
        _until_freed(scene)


def _until_freed(scene: Scene) -> None:
    scene.wait_until_ready()
    with scene.server.connect("checker") as session:
        deadline = time.monotonic() + 30
        while next((pool.draft_bytes for pool in session.status().pools if pool.name == "hog"), 0) and time.monotonic() < deadline:
            time.sleep(0.01)


KINDS: dict[str, Callable[[Scene], None]] = {
    "kill client": kill_client,
    "stop client": stop_client,
    "stop server": stop_server,
    "stop keeper": stop_keeper,
    "tear": tear,
    "vanish": vanish,
    "journal limit": limit_journal,
    "full disk": fill_disk,
    "memory hog": hog_memory,
}


def dealt(chance: random.Random, kills: int, faults: int, *, disk: bool) -> list[str]:
    """Kills of the server and other faults, mixed. Every kind comes before any comes again."""
    kinds = [kind for kind in KINDS if disk or kind != "full disk"]
    others: list[str] = []
    while len(others) < faults:
        others += chance.sample(kinds, len(kinds))
    hands = [*["kill server"] * kills, *others[:faults]]
    chance.shuffle(hands)
    return hands


def inflict(scene: Scene, kind: str) -> None:
    """Do one, and wait until the server is there."""
    (kill_server if kind == "kill server" else KINDS[kind])(scene)
    scene.wait_until_ready()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system that is soon full, mounted on a folder; None where this process may not mount any."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"gms-chaos", os.fsencode(folder), b"tmpfs", 0, f"size={DISK_BYTES},mode=0700".encode()):
        yield None
        return
    try:
        yield folder
    finally:
        if libc.umount2(os.fsencode(folder), 2):  # MNT_DETACH: whatever is still open goes with its last user
            raise OSError(ctypes.get_errno(), "the small disk cannot be unmounted")
