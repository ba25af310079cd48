"""What a peer may cost: each bound is reached on purpose, against a real listener with small limits."""

import contextlib
import socket
import threading

import pytest

from gms_core.cli.servers import ask
from gms_core.client import connect
from gms_core.errors import InvalidArgument, ProtocolError, QuotaExceeded, VersionMismatch
from gms_core.layout import Identity
from gms_core.protocol.channel import Channel
from gms_core.protocol.framing import encode
from gms_core.protocol.messages import Failure, Hello, Status, Welcome
from gms_core.server.limits import Limits
from tests.unit.server_threads import server_in_thread

SMALL = Limits(handshake_s=0.1, frame_s=0.1, sessions=3, pools=2, allocations=4, batch=3, wait_s=60)
PAGE = 4096


@pytest.fixture
def socket_path(runtime_dir):
    """A server with small limits."""
    with server_in_thread(runtime_dir, SMALL, memory_bytes=64 * PAGE) as path:
        yield path


@contextlib.contextmanager
def raw_connection(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        yield connection, Channel(connection)


def test_connection_ends_when_no_handshake_comes(socket_path):
    with raw_connection(socket_path) as (_, channel):
        reply, _ = channel.receive(10)
        assert isinstance(reply, Failure)
        assert reply.code == ProtocolError.code
        assert "no handshake" in reply.message


def test_connection_ends_when_a_request_stops_half_way(socket_path):
    with raw_connection(socket_path) as (connection, channel):
        channel.send(Hello((1,)))
        assert isinstance(channel.receive(10)[0], Welcome)
        connection.sendall(encode(Status())[:-1])
        reply, _ = channel.receive(10)
        assert "did not arrive whole" in reply.message


def test_first_message_is_refused_when_it_is_large(socket_path):
    with raw_connection(socket_path) as (_, channel):
        channel.send(Hello((1,), client="x" * 5000))
        reply, _ = channel.receive(10)
        assert "announced a message" in reply.message


def test_first_message_is_refused_when_it_is_no_handshake(socket_path):
    with raw_connection(socket_path) as (_, channel):
        channel.send(Status())
        assert "not a handshake" in channel.receive(10)[0].message


def test_client_is_refused_with_a_sentence_when_its_protocol_is_another(socket_path):
    with raw_connection(socket_path) as (_, channel):
        channel.send(Hello((99, 100)))
        reply, _ = channel.receive(10)
        assert reply.code == VersionMismatch.code
        assert "[99, 100]" in reply.message


def test_session_is_refused_when_there_are_too_many(socket_path):
    with contextlib.ExitStack() as stack:
        for _ in range(SMALL.sessions):
            stack.enter_context(connect(socket_path=socket_path))
        with pytest.raises(QuotaExceeded):
            connect(socket_path=socket_path)


def test_status_tells_why_when_a_server_takes_no_more_sessions(socket_path):
    with contextlib.ExitStack() as stack:
        for _ in range(SMALL.sessions):
            stack.enter_context(connect(socket_path=socket_path))
        assert isinstance(ask(socket_path, "test").error, QuotaExceeded)


def test_pool_is_refused_when_there_are_too_many(socket_path):
    with connect(socket_path=socket_path) as session:
        leases = [session.acquire(name, "rw", Identity(), timeout_s=0) for name in ("a", "b")]
        with pytest.raises(QuotaExceeded):
            session.acquire("c", "rw", Identity(), timeout_s=0)
        for lease in leases:
            lease.release()
        session.acquire("c", "rw", Identity(), timeout_s=0).release()


def test_allocations_are_refused_when_there_are_too_many(socket_path):
    with connect(socket_path=socket_path) as session:
        lease = session.acquire("a", "rw", Identity(), timeout_s=0, slab_bytes=PAGE)
        with pytest.raises(QuotaExceeded):
            lease.arena.reserve_exact(4 * PAGE)
        lease.arena.reserve_exact(3 * PAGE)
        assert session.status().allocations == 3
        lease.release()
        assert session.status().allocations == 0


def test_wait_is_refused_when_it_is_longer_than_allowed(socket_path):
    with connect(socket_path=socket_path) as session, pytest.raises(InvalidArgument):
        session.acquire("a", "rw", Identity(), timeout_s=61)


def test_waiting_client_costs_nothing_when_it_goes_away(socket_path):
    with connect(socket_path=socket_path) as writer, connect(socket_path=socket_path) as observer:
        lease = writer.acquire("a", "rw", Identity(), timeout_s=0)
        waiter = connect(socket_path=socket_path)
        started = threading.Event()
        thread = threading.Thread(target=_wait_for_ever, args=[waiter, started])
        thread.start()
        assert started.wait(10)
        waiter._channel._socket.shutdown(socket.SHUT_RDWR)
        thread.join()
        waiter.close()
        while len(observer.status().sessions) > 2:
            pass
        assert observer.status().pools[0].waiting == ()
        lease.release()


def _wait_for_ever(session, started):
    with contextlib.suppress(Exception):
        session.acquire("a", "auto", Identity(), timeout_s=50, on_wait=lambda _: started.set())
