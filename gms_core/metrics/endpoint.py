"""The HTTP address of the metrics: one thread, one request at a time, and nothing that a client does ends it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from gms_core.errors import ConfigurationError, InvalidArgument
from gms_core.metrics.scrape import ANSWER_S

log = logging.getLogger(__name__)

CLIENT_S = 5.0
"""Seconds that a client may say nothing, or read nothing."""
LOOK_S = 0.2
"""Seconds between two looks at whether it is over."""


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that the base class has
        """Log it where the others are: an access is no news."""
        log.debug(format, *args)


class _Server(WSGIServer):
    timeout = LOOK_S

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


@contextlib.contextmanager
def metrics_endpoint(host: str, port: int, application: Any) -> Iterator[str]:
    """Answer requests for metrics in a thread, until the context ends; gives the URL.

    Args:
        host: Name or address at which to listen.
        port: 0 for one that is free.
        application: What answers, by WSGI.

    Raises:
        InvalidArgument: The host is unknown.
        ConfigurationError: It cannot be listened there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise InvalidArgument(f"metrics cannot be served at {host!r}: {error}") from error

    class Server(_Server):
        address_family = family

    try:
        server = Server((str(address[0]), int(address[1])), _Handler)
    except OSError as error:
        message = f"metrics cannot be served at {host} port {port}: {error.strerror}"
        raise ConfigurationError(message, hint="Name another address, or end what listens there.") from error
    server.set_app(application)
    over = threading.Event()

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
        thread.join(ANSWER_S)  # no longer: a client that is slow to read must not keep servers from ending
        server.server_close()
