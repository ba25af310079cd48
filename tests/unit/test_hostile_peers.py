"""Peers that mean no good: each costs its own connection and nothing else, and the server has afterwards what it had before."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from gms_core.cli import gms
from gms_core.client import Membership, connect
from gms_core.errors import InvalidArgument, QuotaExceeded
from gms_core.layout import Identity
from gms_core.protocol.channel import Channel
from gms_core.protocol.framing import HEADER, MAGIC, MAX_DESCRIPTORS, MAX_PAYLOAD, encode
from gms_core.protocol.generations import AwaitGeneration
from gms_core.protocol.messages import Commit, Failure, Hello, Release, Status, Welcome
from gms_core.server.connection import READ_AHEAD
from gms_core.server.limits import Limits
from gms_core.server.listener import COMPLAINTS
from tests.conftest import SERVE, RunningServer
from tests.unit.server_threads import server_in_thread

PATIENCE_S = 30.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def descriptors_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(path))
        yield connection


@contextlib.contextmanager
def greeted(path: Path) -> Iterator[tuple[socket.socket, Channel]]:
    with raw(path) as connection:
        channel = Channel(connection)
        channel.send(Hello((2, 1)))
        assert isinstance(channel.receive(PATIENCE_S)[0], Welcome)
        yield connection, channel


@pytest.mark.parametrize("before", [b"", encode(Hello((2, 1)))], ids=["at once", "after the handshake"])
@pytest.mark.parametrize(
    "data", [b"G", encode(Status())[:-1], encode(Status()), HEADER.pack(MAGIC, 10, MAX_DESCRIPTORS)], ids=["byte", "part", "whole", "announced"]
)
def test_descriptors_are_closed_when_a_peer_sends_as_many_as_it_can_and_vanishes(server: RunningServer, before: bytes, data: bytes) -> None:
    pid = server.pid
    server.connect().close()
    until(lambda: server.pid == pid)
    idle = descriptors_of(pid)
    with open(os.devnull, "rb") as file:
        many = array.array("i", [file.fileno()] * MAX_DESCRIPTORS)
        for _ in range(20):
            with raw(server.socket) as connection:
                if before:
                    connection.sendall(before)
                    connection.recv(65536)
                connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
    until(lambda: descriptors_of(pid) <= idle)
    assert server.pid == pid


@pytest.mark.parametrize("behind", [0, READ_AHEAD - 1, READ_AHEAD, 20])
def test_request_is_withdrawn_when_its_peer_vanishes_with_others_behind_it(server: RunningServer, behind: int) -> None:
    pid = server.pid
    server.connect().close()
    until(lambda: server.pid == pid)
    idle = descriptors_of(pid)
    with greeted(server.socket) as (_, channel):
        channel.send(AwaitGeneration("weights", 0, 3600.0))
        for _ in range(behind):
            channel.send(Status())
        with server.connect() as observer:
            until(lambda: any(session.waiting_for for session in observer.status().sessions))
    with server.connect() as observer:
        until(lambda: len(observer.status().sessions) == 1)
    until(lambda: descriptors_of(pid) <= idle)


def test_server_lives_when_descriptors_come_and_it_can_open_no_more(server: RunningServer) -> None:
    pid = server.pid
    with greeted(server.socket) as (connection, channel), open(os.devnull, "rb") as file:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors_of(pid) + 4, hard))
        try:
            many = array.array("i", [file.fileno()] * 100)
            connection.sendmsg([encode(Status())], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
            reply, _ = channel.receive(PATIENCE_S)
            assert isinstance(reply, Failure)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert server.pid == pid


def test_others_are_answered_when_peers_take_no_replies(runtime_dir: Path) -> None:
    with server_in_thread(runtime_dir, Limits(send_s=0.2)) as path, connect(socket_path=path) as other, contextlib.ExitStack() as peers:
        for _ in range(5):
            connection, _ = peers.enter_context(greeted(path))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while True:
                    connection.send(encode(Status()) * 100)
            assert other.status().device == "host"
        until(lambda: len(other.status().sessions) == 1)


def test_others_are_answered_when_peers_send_byte_by_byte(runtime_dir: Path) -> None:
    with server_in_thread(runtime_dir, Limits(frame_s=0.3, handshake_s=0.3)) as path, connect(socket_path=path) as other:
        hello, request = encode(Hello((2, 1))), encode(Release("a" * 2000))
        with raw(path) as early, greeted(path) as (late, _):
            told: set[socket.socket] = set()
            for index in range(10**6):
                for connection, data in ((early, hello), (late, request)):
                    if connection not in told and index < len(data) - 1:
                        connection.send(data[index : index + 1])
                    with contextlib.suppress(BlockingIOError):
                        connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
                        told.add(connection)
                assert other.status().device == "host"
                if len(told) == 2:
                    break
        until(lambda: len(other.status().sessions) == 1)


def test_peer_is_cut_off_when_it_sends_more_than_a_user_may_have_under_way(runtime_dir: Path) -> None:
    with server_in_thread(runtime_dir, Limits(received_bytes=3 * 2**20, frame_s=60)) as path, connect(socket_path=path) as other:
        with contextlib.ExitStack() as peers:
            connections = [peers.enter_context(greeted(path)) for _ in range(4)]
            for connection, _ in connections:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(HEADER.pack(MAGIC, MAX_PAYLOAD, 0) + bytes(2**20))
            until(lambda: len(other.status().sessions) < 5)
            assert len(other.status().sessions) >= 3, "only who went beyond it is cut off"
        until(lambda: len(other.status().sessions) == 1)
        with greeted(path) as (_, channel):
            channel.send(Commit("none", (), bytes(2 * 2**20), Identity()))
            assert isinstance(channel.receive(PATIENCE_S)[0], Failure)
            channel.send(Status())
            assert not isinstance(channel.receive(PATIENCE_S)[0], Failure)


def test_user_is_refused_when_too_many_of_its_connections_have_not_shaken_hands(runtime_dir: Path) -> None:
    with server_in_thread(runtime_dir, Limits(handshakes=3, handshake_s=60)) as path, contextlib.ExitStack() as peers:
        idle = [peers.enter_context(raw(path)) for _ in range(3)]
        until(lambda: _is_refused(path))
        idle[0].close()
        until(lambda: not _is_refused(path))
        connect(socket_path=path).close()


def _is_refused(path: Path) -> bool:
    try:
        connect(socket_path=path).close()
    except QuotaExceeded:
        return True
    return False


def test_reason_is_told_when_the_server_has_refused_before_the_client_says_anything(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Channel.send

    def send_late(channel: Channel, message: Hello) -> None:
        until(channel.has_ended)
        send(channel, message)

    with server_in_thread(runtime_dir, Limits(handshakes=1, handshake_s=60)) as path, raw(path):
        until(lambda: _is_refused(path))
        monkeypatch.setattr(Channel, "send", send_late)
        with pytest.raises(QuotaExceeded, match="shaken hands"):
            connect(socket_path=path)


def test_memory_is_made_and_engines_are_watched_when_sessions_have_all_the_files_that_they_may_have(runtime_dir: Path) -> None:
    limited = (
        sys.executable,
        "-c",
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n{SERVE}",
        "host",
        str(runtime_dir),
        "0",
    )
    with subprocess.Popen(limited, stdout=subprocess.PIPE, text=True) as supervisor, contextlib.ExitStack() as sessions:
        assert supervisor.stdout is not None
        path = Path(supervisor.stdout.readline().strip())
        first = sessions.enter_context(connect(socket_path=path))
        for _ in range(63):
            sessions.enter_context(connect(socket_path=path))
        with pytest.raises(QuotaExceeded, match="64 sessions are open already"):
            connect(socket_path=path)
        lease = first.acquire("weights", "rw", Identity(), timeout_s=0, slab_bytes=4096)
        lease.arena.reserve_exact(20 * 4096)
        assert first.status().allocations == 20
        lease.release()
        sessions.close()
        supervisor.terminate()


EVIL = "[/x][red]\x1b[2J\nINFO gms[1] all is well"


def test_log_and_status_are_in_order_when_a_client_has_a_wild_name(server: RunningServer) -> None:
    with server.connect(EVIL) as session:
        lease = session.acquire("weights", "rw", Identity({"model": EVIL}), timeout_s=0)
        read = lease.commit(b"", Identity({"model": EVIL}))
        shown = CliRunner().invoke(gms, ["status", "--runtime-dir", str(server.directory)])
        assert shown.exit_code == 0, shown.output
        assert "[/x][red]\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}INFO" in shown.output
        assert "\x1b" not in shown.output
        assert EVIL not in {one.client for one in session.status().sessions}
        for name in ("a\nb", "\x1b[2J", "", "x" * 300):
            with pytest.raises(InvalidArgument):
                Membership.join(session, name, "engine", "rank 0")
        read.release()


def test_log_does_not_grow_with_every_refusal_when_there_are_many(runtime_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with server_in_thread(runtime_dir, Limits()) as path:
        for _ in range(100):
            with raw(path) as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request")
                assert connection.recv(4096)
    refusals = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(refusals) == COMPLAINTS
