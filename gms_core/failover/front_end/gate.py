"""The gate in its port form: an address that belongs to the engine from the start, and at which nobody listens before it is the primary.

A TCP port is bound at once, with SO_REUSEPORT, so that all engines of one lock can have it: only a socket that listens gets connections. The path of
a Unix socket can have one owner only, so it is taken at the moment of listening, by a rename over whatever a dead engine has left there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gms_core.errors import ConfigurationError
from gms_core.failover.http import App, Event, Receive, Scope, Send

_listeners: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Of this process alone: a copy in a forked child would go on to listen when this process has ended, with nobody who accepts."""

_LOOK_S = 0.001
"""Seconds between two looks at whether a server has started: it is some steps of its event loop away."""
_MOST_PATH_BYTES = 107
"""Of a Unix socket's path; one byte more is its end (unix(7))."""


def check_path(path: Path, option: str) -> None:
    """Make sure that a Unix socket can be given this path later.

    Args:
        path: The path.
        option: Of the command line, by which the user has named it.

    Raises:
        ConfigurationError: It cannot.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigurationError(f"{option} {path} exists and is no socket", hint="Name another path, or remove the file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{option} {path}: nothing can be written to {path.parent}", hint="Name a path in a directory of yours.")
    if len(os.fsencode(beside(path))) > _MOST_PATH_BYTES:
        raise ConfigurationError(f"{option} {path} is too long", hint=f"Name a path of at most {_MOST_PATH_BYTES - 10} bytes.")


def check_unused(path: Path, option: str) -> None:
    """Refuse the path of a server that answers: where a shadow answers too, each engine has a path of its own. See `check_path`.

    Raises:
        ConfigurationError: A server answers there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise ConfigurationError(f"{option} {path}: another server answers there", hint="With the gate 503 each engine needs an address of its own.")


def beside(path: Path) -> Path:
    """A name for a file of this process beside a path, from which it can be renamed to that."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def bind_port(host: str, port: int, *, shared: bool) -> socket.socket:
    """Bind a TCP port, and do not listen at it. Processes that are forked from this one have no part in it.

    Args:
        host: Name or address.
        port: The port; 0 for any.
        shared: Whether other sockets that do not listen may have the same one.

    Raises:
        ConfigurationError: It cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        _listeners.add(listener)
    except OSError as error:
        raise ConfigurationError(
            f"{host}:{port} cannot be had: {error.strerror}",
            hint="Engines that stand in for one another can share a port with the gate port; with the gate 503 each needs one of its own.",
        ) from error
    return listener


def take_path(listener: socket.socket, path: Path, backlog: int | None = None) -> None:
    """Bind a Unix socket to a path, and let it listen if that is wanted, in one step with taking the path from whoever had it."""
    temporary = beside(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    listener.bind(str(temporary))
    if backlog is not None:
        listener.listen(backlog)
    os.replace(temporary, path)


class Gate:
    """The listening socket of one API server, from standby to the end. It belongs to the event loop that serves.

    Attributes:
        address: For people and notifications.
    """

    def __init__(self, listener: socket.socket, path: Path | None, backlog: int) -> None:
        """Take over a socket that does not listen yet. Processes that are forked from this one lose it.

        Args:
            listener: Of this API server, or shared by all of its engine.
            path: Of a Unix socket.
            backlog: Connections that the kernel keeps until they are accepted.
        """
        _listeners.add(listener)
        self._listener = listener
        self._path = path
        self._backlog = backlog
        self._open = asyncio.Event()
        self._ready = asyncio.Event()
        self.address = f"unix:{path}" if path is not None else _host_and_port(listener)

    def open(self) -> None:
        """Listen. From here on clients can connect, and wait in the backlog until the HTTP server accepts them."""
        if self._path is not None and not self._listener.getsockname():
            try:
                take_path(self._listener, self._path, self._backlog)
            except OSError as error:
                # The socket has a name since it was looked at: another API server of this engine, which shares it, was faster.
                if error.errno != errno.EINVAL:
                    raise
        self._listener.listen(self._backlog)
        self._open.set()

    async def served_by(self, server: Any) -> None:
        """Wait until an HTTP server has the socket, some steps after `open`. It lets the socket listen once more, so that `shut` lasts from then on.

        Args:
            server: Uvicorn's.
        """
        while not server.started:
            await asyncio.sleep(_LOOK_S)

    def check_alone(self) -> None:
        """Make sure that nobody else listens at a TCP port that is about to be listened at; it could be shared without either of them knowing.

        Raises:
            ConfigurationError: Somebody does, and is not of this engine's lock: whoever has had that is gone.
        """
        if self._path is not None:
            return
        with socket.socket(self._listener.family, socket.SOCK_STREAM) as probe:
            # Without SO_REUSEPORT it cannot be bound beside a socket that listens, but beside others that are bound.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self._listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            try:
                probe.bind(self._listener.getsockname())
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise ConfigurationError(
                    f"another server listens at {self.address}", hint="Engines that do not stand in for one another need ports of their own."
                ) from error

    def let_go(self) -> None:
        """The HTTP server has ended: nobody has to wait for the gate any more."""
        self._open.set()

    async def reach(self) -> None:
        """All else is ready to serve: wait until the gate is open, or nobody needs it any more."""
        self._ready.set()
        await self._open.wait()

    async def reached(self) -> None:
        """Wait until all else is ready to serve."""
        await self._ready.wait()

    def shut(self, servers: Iterable[Any]) -> None:
        """Listen no more, in any process that shares the socket. What is connected stays. See `served_by`.

        Args:
            servers: What the event loop listens with, in this process.
        """
        with contextlib.closing(self._listener.dup()) as listener:
            for server in servers:
                server.close()
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise


class ListenLast:
    """Keeps an HTTP server that speaks ASGI from listening until its gate is open, though everything else is ready.

    A server listens once its app has said that it is started. So the app is started, and its word is kept back.
    """

    def __init__(self, app: App, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on but that word; say it in place of an app that does not, for which the HTTP server would listen at once."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        spoke = False

        async def held(event: Event) -> None:
            nonlocal spoke
            spoke = True
            if event["type"] == "lifespan.startup.complete":
                await self._gate.reach()
            await send(event)

        try:
            await self._app(scope, receive, held)
        except Exception:
            if spoke:
                raise
        if not spoke:
            await self._gate.reach()
            await send({"type": "lifespan.startup.complete"})


def _host_and_port(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _after_fork() -> None:
    for listener in list(_listeners):
        if (descriptor := listener.detach()) >= 0:  # close() does nothing while an event loop such as uvloop has the socket
            os.close(descriptor)
    _listeners.clear()


os.register_at_fork(after_in_child=_after_fork)
