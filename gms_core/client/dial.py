"""Connecting to a device server, for the first time or once more, and what its first answer says."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from gms_core.allowed import trusted_servers
from gms_core.config import settings
from gms_core.errors import ConnectionLost, PermissionRefused, ProtocolError, ServerUnavailable, SessionClosed, VersionMismatch, rebuild
from gms_core.protocol.channel import Channel
from gms_core.protocol.framing import close_descriptors
from gms_core.protocol.generations import FEATURE, GenerationRequest
from gms_core.protocol.messages import Commit, Failure, Hello, Message, Waiting, Welcome
from gms_core.protocol.peer import connect, peer_credentials
from gms_core.runtime_dir import check_socket, keeper_path, start_hint, untrusted

AGAIN_S = 0.02
"""Seconds between two tries to reach the server that follows one which was killed."""
GREET_S = 10.0
"""Seconds for one try, at least."""
LOOK_S = 0.5
"""Seconds between two looks at whether a connection that is being made is still wanted."""

Answer = tuple[Message, tuple[int, ...]]
"""A reply and its descriptors."""


def greet(path: Path, hello: Hello, timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> tuple[Channel, Welcome]:
    """Connect to a socket and shake hands.

    Args:
        path: Of the socket.
        hello: The first message.
        timeout_s: Seconds that it may take.
        given_up: Asked now and then: whether nobody wants it any more.

    Raises:
        ServerUnavailable: No server listens there.
        PermissionRefused: The socket, or the server behind it, is another user's.
        ProtocolError: Something else listens there.
        GmsError: The server does not want this client; as it says.
    """
    check_socket(path)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise ServerUnavailable(f"no connection to {path} can be made: {error.strerror}") from error
    channel = Channel(connection)
    deadline = time.monotonic() + timeout_s
    try:
        _dial(connection, path, timeout_s)
        try:
            try:
                channel.send(hello)
            except ConnectionLost:
                if not channel.ended:
                    raise
                # A server that refuses a connection does not wait for what it has to say: the reason may be there.
            answer = _first_answer(channel, deadline, given_up)
        except ConnectionLost as error:
            raise ServerUnavailable(f"{path} does not answer as a GMS server: {error}") from error
        welcome, descriptors = accepted(answer)
        if not isinstance(welcome, Welcome) or descriptors:
            close_descriptors(descriptors)
            raise ProtocolError(f"the server answered with {type(welcome).__name__} where Welcome was due")
    except BaseException:
        channel.close()
        raise
    return channel, welcome


def _first_answer(channel: Channel, deadline: float, given_up: Callable[[], bool]) -> Answer:
    while True:
        try:
            return final(channel, max(0.0, min(LOOK_S, deadline - time.monotonic())), None)
        except ConnectionLost:
            if channel.ended or given_up() or time.monotonic() >= deadline:
                raise


def greet_next(path: Path, hello: Hello, timeout_s: float) -> tuple[Channel, Welcome]:
    """Connect to a socket and shake hands; where a server has been killed, wait for the one that follows.

    Raises:
        GmsError: As `greet` says.
    """
    deadline, follows = time.monotonic() + timeout_s, _Following(path)
    while True:
        try:
            return greet(path, hello, max(AGAIN_S, deadline - time.monotonic()))
        except ServerUnavailable:
            if time.monotonic() + AGAIN_S > deadline or not follows.may():
                raise
        time.sleep(AGAIN_S)


class _Following:
    """Whether another server may follow one which has gone: its keeper is there."""

    def __init__(self, path: Path) -> None:
        self._keeper = keeper_path(path)
        self._next_look = 0.0

    def may(self) -> bool:
        """Whether it is worth waiting. A keeper that was killed has left its socket; it is seen now and then: a look costs the keeper something."""
        now = time.monotonic()
        if now < self._next_look:
            return self._keeper.exists()
        self._next_look = now + LOOK_S
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            try:
                connection.connect(os.fspath(self._keeper))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            except OSError:  # it is busy, or this process may not ask it
                return self._keeper.exists()
        return True


def resume(path: Path, hello: Hello, welcome: Welcome, repeats: bool, given_up: Callable[[], bool]) -> tuple[Channel, Welcome]:
    """Connect to the server that follows one which has gone without giving anything up, and go on with a session there.

    Args:
        path: Of the socket.
        hello: The session's first message.
        welcome: What it was answered with.
        repeats: Whether the next request is one that may have been carried out already.
        given_up: Whether the session was closed meanwhile.

    Raises:
        ConnectionLost: No server came back in time, there will be none, or it has released what the session had.
        SessionClosed: It was closed meanwhile.
    """
    deadline, follows = time.monotonic() + welcome.grace_s, _Following(path)
    again = msgspec.structs.replace(hello, resume=welcome.token, session=welcome.session, repeats=repeats)
    while True:
        try:
            # One try for all of the time: a server that has much to take over must not read one that was given up.
            channel, found = greet(path, again, max(GREET_S, deadline - time.monotonic()), given_up)
        except (ServerUnavailable, PermissionRefused) as error:  # a socket that is just being made may not have its mode yet
            if not follows.may():
                raise ConnectionLost(f"the server at {path} has ended") from error
            if time.monotonic() > deadline:
                raise ConnectionLost(f"the server at {path} has gone, and no other one came within {welcome.grace_s:g} s") from error
        else:
            if (found.session, found.token) == (welcome.session, welcome.token):
                return channel, found
            channel.close()  # an older version, which knows nothing of it and has begun another session
            raise ConnectionLost(f"the server at {path} cannot go on with sessions of the one before")
        if given_up():
            raise SessionClosed("the session is closed")
        time.sleep(AGAIN_S)


def _dial(connection: socket.socket, path: Path, timeout_s: float) -> None:
    try:
        connect(connection, path, timeout_s)
    except PermissionError as error:
        raise PermissionRefused(f"{path} may not be used by this user: {error.strerror}") from error
    except OSError as error:
        raise ServerUnavailable(f"nothing listens at {path}: {error.strerror or error}", hint=start_hint(path)) from error
    owner = peer_credentials(connection).uid
    if owner not in trusted_servers(settings().server_user):
        raise untrusted(f"the server behind {path} runs as user {owner}")


def final(channel: Channel, timeout_s: float | None, on_wait: Callable[[str], None] | None) -> Answer:
    """The next reply that is no notice."""
    while True:
        reply, descriptors = channel.receive(timeout_s)
        if not isinstance(reply, Waiting):
            return reply, descriptors
        if on_wait is not None:
            on_wait(reply.reason)


def accepted(answer: Answer) -> Answer:
    """The same answer, unless it is a refusal: that is raised as the error that it names."""
    reply, descriptors = answer
    if isinstance(reply, Failure):
        close_descriptors(descriptors)
        raise rebuild(reply.code, reply.message, reply.hint, reply.details)
    return answer


def require(welcome: Welcome, feature: str) -> None:
    """Raise `VersionMismatch` unless the server has a feature: to an older one the request would be a broken protocol, and the session would end."""
    if feature not in welcome.features:
        raise VersionMismatch(
            f"this server (gms {welcome.server}) is too old for what is asked of it",
            hint="gms serve --replace, of this version of gms, takes over from it.",
        )


def check_known(welcome: Welcome, request: Message) -> None:
    """Raise `VersionMismatch` if a server is too old for a request, or would carry out a part of it only.

    It is asked of each request when that is sent: the server that a session goes on at may be older than the one before.
    """
    if isinstance(request, GenerationRequest) or (isinstance(request, Commit) and request.pin):
        require(welcome, FEATURE)


def in_the_time_left(request: Message, deadline: float) -> Message:
    """The same request, to be asked again: it must not wait longer in all."""
    wait_s = getattr(request, "timeout_s", None)
    if wait_s is None:
        return request
    return msgspec.structs.replace(request, timeout_s=max(0.0, min(wait_s, deadline - time.monotonic())))
