"""Another user of the machine: stopped by the file's mode, and where that was loosened, by both ends themselves."""

import os
import socket
import subprocess
import sys

import pytest

from gms_core.client import connect
from gms_core.errors import PermissionRefused
from gms_core.protocol.messages import Failure

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another user")

BECOME_NOBODY = f"""
import os
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
"""

CONNECT_RAW = """
import socket, sys
from gms_core.protocol.channel import Channel
from gms_core.protocol.messages import Failure, Hello
BECOME_NOBODY
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
channel = Channel(connection)
channel.send(Hello((1,)))
reply, _ = channel.receive(10)
print(type(reply).__name__, reply.code)
"""

LISTEN = """
import socket, sys
BECOME_NOBODY
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
print("ready", flush=True)
listening.accept()
"""


def run_as_nobody(code, path):
    """Run code that changes its user once it has imported what it needs, which another user may not be able to read."""
    return subprocess.Popen([sys.executable, "-c", code.replace("BECOME_NOBODY", BECOME_NOBODY), str(path)], stdout=subprocess.PIPE, text=True)


def test_connection_is_refused_when_another_user_gets_through_to_the_socket(server):
    server.directory.chmod(0o711)
    server.socket.chmod(0o666)
    with run_as_nobody(CONNECT_RAW, server.socket) as stranger:
        told, _ = stranger.communicate(timeout=60)
    assert told.split() == [Failure.__name__, PermissionRefused.code]


def test_socket_is_refused_when_another_user_made_it(runtime_dir):
    runtime_dir.chmod(0o777)
    path = runtime_dir / "host.sock"
    with run_as_nobody(LISTEN, path) as stranger:
        assert stranger.stdout.readline() == "ready\n"
        with pytest.raises(PermissionRefused):
            connect(socket_path=path)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
        stranger.wait(60)
