"""What a client is told when something is wrong, by the server or before it gets that far."""

import socket
import threading

import pytest

from gms_core.client import connect
from gms_core.errors import InvalidArgument, LeaseConflict, PoolNotFound, ProtocolError, ServerUnavailable, WrongDevice
from gms_core.protocol.framing import HEADER, MAGIC
from gms_core.protocol.messages import Export
from tests.unit.publishing import MODEL, publish


def test_command_is_named_when_no_server_runs(runtime_dir):
    with pytest.raises(ServerUnavailable, match="gms serve"):
        connect(socket_path=runtime_dir / "host.sock")


def test_socket_is_refused_when_something_else_listens(runtime_dir):
    path = runtime_dir / "host.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen()

        def answer():
            with listening.accept()[0] as connection:
                connection.recv(10)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ProtocolError, match="does not speak"):
            connect(socket_path=path)
        thread.join()


def test_device_is_checked_when_the_server_has_another(server):
    with pytest.raises(WrongDevice):
        connect("GPU-11111111-2222-3333-4444-555555555555", socket_path=server.socket)


def test_other_connections_live_when_a_client_talks_nonsense(server):
    with server.connect() as session:
        for nonsense in (b"\x00" * 100, HEADER.pack(MAGIC, 2**31, 0), HEADER.pack(MAGIC, 10, 200), HEADER.pack(MAGIC, 3, 0) + b"\xff\xff\xff"):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.settimeout(10)
                rude.connect(str(server.socket))
                rude.sendall(nonsense)
                while rude.recv(65536):
                    pass
        assert [other.id for other in session.status().sessions] == [1]


def test_connection_is_refused_when_it_sends_descriptors(server):
    with socket.socket(socket.AF_UNIX) as rude:
        rude.settimeout(10)
        rude.connect(str(server.socket))
        socket.send_fds(rude, [HEADER.pack(MAGIC, 3, 1)], [0])
        while rude.recv(65536):
            pass


@pytest.mark.parametrize("name", ["", "a" * 65, "../etc", "a b", "ä"])
def test_pool_is_refused_when_its_name_is_odd(server, name):
    with server.connect() as session, pytest.raises(InvalidArgument):
        session.acquire(name, "auto", MODEL, timeout_s=0)


def test_second_lease_is_refused_when_the_session_has_one(server):
    with server.connect() as session:
        lease = publish(session, b"x")
        with pytest.raises(LeaseConflict):
            session.acquire("weights", "ro", MODEL, timeout_s=0)
        lease.release()


def test_pool_is_not_found_when_nobody_ever_wrote_it(server):
    with server.connect() as session, pytest.raises(PoolNotFound):
        session.receive_allocations(Export("nothing"), lambda _: None)
