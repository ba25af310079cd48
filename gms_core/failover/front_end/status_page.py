"""``/gms/status`` and ``/health`` at an address of their own, at all times: the engine's own port is silent while it is a shadow.

It is served by uvicorn, which every engine brings along; nothing else of GMS imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from gms_core.errors import ConfigurationError
from gms_core.failover.http import StatusApp
from gms_core.failover.status import EngineState


class _Server(uvicorn.Server):
    """An HTTP server that leaves signals to the engine's own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen_at(address: str) -> socket.socket:
    """A socket at the page's address.

    Args:
        address: ``HOST:PORT``.

    Raises:
        ConfigurationError: It cannot be had.
    """
    host, _, port = address.rpartition(":")
    try:
        return socket.create_server((host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(
            f"status_address {address} cannot be used: {error.strerror}", hint="Each engine needs an address of its own, on this machine."
        ) from error


class StatusPage:
    """The page, served in the running event loop until `close`."""

    def __init__(self, state: EngineState, address: str) -> None:
        """Begin to serve.

        Args:
            state: What the page shows.
            address: ``HOST:PORT``.

        Raises:
            ConfigurationError: The address cannot be had.
        """
        config = uvicorn.Config(StatusApp(state), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve([listen_at(address)]))

    def close(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
