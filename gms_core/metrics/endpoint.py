"""The HTTP address of the metrics: one thread, one request at a time, and nothing that a client does ends it."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from gms_core.errors import ConfigurationError, InvalidArgument
from gms_core.metrics.scrape import ANSWER_S

log = logging.getLogger(__name__)

CLIENT_S = 5.0
"""Seconds that a client may say nothing, or read nothing."""
AGAIN_S = 0.02
"""Seconds between two tries to listen where somebody is about to leave."""


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that the base class has
        """Log it where the others are: an access is no news."""
        log.debug(format, *args)


class _Server(WSGIServer):
    def server_bind(self) -> None:
        """Bind; the base class would ask the network for this machine's name, which can take long and is of no use."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - socketserver's signature
        """A client that went away or was too slow has cost its own request."""
        log.debug("a request for metrics by %s was not answered", client_address, exc_info=True)


class Endpoint:
    """An address at which metrics are served.

    Args:
        host: Name or address at which to listen.
        port: 0 for one that is free.
        application: What answers, by WSGI.

    Raises:
        InvalidArgument: The host is unknown.
    """

    def __init__(self, host: str, port: int, application: Any) -> None:
        self._shown = f"{host} port {port}"
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        except (OSError, UnicodeError) as error:
            raise InvalidArgument(f"metrics cannot be served at {host!r}: {error}") from error
        self._family, self._address, self._application = family, (str(address[0]), int(address[1])), application

    @contextlib.contextmanager
    def listening(self, patience_s: float = 0.0) -> Iterator[str]:
        """Answer requests in a thread, until the context ends; gives the URL.

        Args:
            patience_s: Seconds for which somebody else who listens there may take to leave.

        Raises:
            ConfigurationError: It cannot be listened there.
        """
        server, over = self._bound(time.monotonic() + patience_s), threading.Event()

        def answer() -> None:
            while not over.is_set():
                server.handle_request()

        thread = threading.Thread(target=answer, name="gms-metrics", daemon=True)
        thread.start()
        try:
            shown = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
            yield f"http://{shown}:{server.server_port}/metrics"
        finally:
            over.set()
            with contextlib.suppress(OSError):
                server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, and makes room for who listens here next
            thread.join(ANSWER_S)  # no longer: a client that is slow to read must not keep servers from ending
            server.server_close()

    def _bound(self, deadline: float) -> WSGIServer:
        class Server(_Server):
            address_family = self._family

        while True:
            try:
                server = Server(self._address, _Handler)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    time.sleep(AGAIN_S)
                    continue
                message = f"metrics cannot be served at {self._shown}: {error.strerror}"
                raise ConfigurationError(message, hint="Name another address, or end what listens there.") from error
            server.set_app(self._application)
            return server
