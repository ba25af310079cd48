"""Device servers for host memory, each in a runtime directory of its own, as the nodes of a large engine have them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gms_core.client import connect
from gms_core.devices import HOST
from gms_core.errors import ServerUnavailable
from gms_core.runtime_dir import socket_path

PATIENCE_S = 30.0


@contextlib.contextmanager
def running_servers(count: int) -> Iterator[list[Path]]:
    """So many servers, until the context ends; their sockets."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(count):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gms-")))
            words = ["serve", "--device", HOST, "--runtime-dir", str(directory)]
            server = subprocess.Popen([sys.executable, "-m", "gms_core.cli", *words], stderr=subprocess.DEVNULL)
            stack.callback(_end, server)
            sockets.append(socket_path(HOST, directory))
        for socket in sockets:
            _wait_for(socket)
        yield sockets


def _wait_for(socket: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connect(socket_path=socket, client="groups").close()
        except ServerUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait(PATIENCE_S)
