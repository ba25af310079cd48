"""How two machines find out that they have the same secret, before either tells the other anything, and that an offer comes from there unchanged.

Both prove it by a keyed hash (HMAC-SHA256) of numbers that both have chosen for this connection; the offer has one too. Nothing is encrypted, here or
on the way that the weights take: the secret keeps out who does not have it, not who listens on the network or changes its packets later.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gms_core.errors import InvalidArgument, PermissionRefused, TransferFailed

PATIENCE_S = 10.0
"""Seconds in which both sides have proved that they know the secret."""
OFFER_S = 60.0
"""Seconds for the offer then."""
_NONCE = 32
_MAC = hashlib.sha256().digest_size
_LEAST_SECRET, _MOST_SECRET = 16, 4096
MOST_OFFER = 256 * 2**20
"""Bytes of an offer."""
_HELLO = b"gms-peer/1"


class Address(NamedTuple):
    """Where a machine serves."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """Understand ``HOST:PORT``, where an IPv6 address is in brackets.

    Raises:
        InvalidArgument: It is something else.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"{text!r} is not HOST:PORT")
    return Address(host, int(port))


def read_secret(path: Path) -> bytes:
    """The secret in a file, which nobody else may read.

    Raises:
        InvalidArgument: There is none, or it is too short or too long.
        PermissionRefused: The file is another user's, or others may read it.
    """
    make = f"Make one: (umask 077; head -c 32 /dev/urandom | base64 > {path}), and copy it to the other machine."
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgument(f"the file of the secret, {path}, cannot be opened: {error.strerror}", hint=make) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidArgument(f"{path} is no regular file", hint=make)
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077:
            raise PermissionRefused(f"{path} is not this user's alone", hint=f"chmod 600 {path}")
        secret = os.read(descriptor, _MOST_SECRET + 1).strip()
    finally:
        os.close(descriptor)
    if not _LEAST_SECRET <= len(secret) <= _MOST_SECRET:
        raise InvalidArgument(f"the secret in {path} does not have {_LEAST_SECRET} to {_MOST_SECRET} bytes", hint=make)
    return secret


def ask(peer: socket.socket, secret: bytes, where: str) -> bytes:
    """Prove to a machine that serves that the secret is known, and take its offer.

    Args:
        peer: Connected.
        secret: That both have.
        where: The peer, for messages.

    Raises:
        PermissionRefused: It has another secret.
        TransferFailed: It does not answer in time, or speaks something else.
    """
    try:
        until = time.monotonic() + PATIENCE_S
        mine = secrets.token_bytes(_NONCE)
        _send(peer, _HELLO + mine, until)
        theirs = _receive(peer, _NONCE, until)
        _send(peer, _mac(secret, b"pulls", mine, theirs), until)
        try:
            proof = _receive(peer, _MAC + 8, until)
        except ConnectionError as error:
            raise PermissionRefused(
                f"{where} has closed the connection",
                hint="Its secret is another one, it serves as many as it can, or it has ended: what gms snapshot serve has printed says which.",
            ) from error
        size = proof[_MAC:]
        if not hmac.compare_digest(proof[:_MAC], _mac(secret, b"serves", mine, theirs, size)):
            raise PermissionRefused(f"{where} does not have the same secret", hint="Copy the file with the secret from there.")
        if int.from_bytes(size) > MOST_OFFER:
            raise TransferFailed(f"{where} offers more than can be understood", hint="Use the same version of GMS on both machines.")
        until = time.monotonic() + OFFER_S
        offer = _receive(peer, int.from_bytes(size), until)
        proof = _receive(peer, _MAC, until)
    except OSError as error:
        raise TransferFailed(f"{where} cannot be asked what it serves: {error}", hint="gms snapshot serve has to run there.") from error
    if not hmac.compare_digest(proof, _mac(secret, b"offers", mine, theirs, offer)):
        raise PermissionRefused(f"what {where} has sent was changed on the way", hint="Look who is in the network between.")
    peer.settimeout(None)
    return offer


def answer(peer: socket.socket, secret: bytes, offer: bytes, has_room: Callable[[], bool] = lambda: True) -> None:
    """Make sure that who has connected knows the secret, and only then make the offer.

    Args:
        peer: It has connected.
        secret: That it has to have.
        offer: For it.
        has_room: Asked once it has proved that it knows the secret: whether it can be served.

    Raises:
        PermissionRefused: It does not, or there is no room for it.
        OSError: It has gone, or says nothing.
    """
    until = time.monotonic() + PATIENCE_S
    hello = _receive(peer, len(_HELLO) + _NONCE, until)
    if not hello.startswith(_HELLO):
        raise PermissionRefused("it speaks something else")
    theirs, mine = hello[len(_HELLO) :], secrets.token_bytes(_NONCE)
    _send(peer, mine, until)
    if not hmac.compare_digest(_receive(peer, _MAC, until), _mac(secret, b"pulls", theirs, mine)):
        raise PermissionRefused("it has another secret")
    if not has_room():
        raise PermissionRefused("too many others are being served")
    until, size = time.monotonic() + OFFER_S, len(offer).to_bytes(8)
    _send(peer, _mac(secret, b"serves", theirs, mine, size) + size, until)
    _send(peer, offer, until)
    _send(peer, _mac(secret, b"offers", theirs, mine, offer), until)
    peer.settimeout(None)


def _mac(secret: bytes, who: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join((_HELLO, b" ", who, *parts)), "sha256")


def _send(peer: socket.socket, data: bytes, until: float) -> None:
    """Send all of it, until a moment of the monotonic clock."""
    peer.settimeout(_left(until))
    peer.sendall(data)


def _receive(peer: socket.socket, size: int, until: float) -> bytes:
    """So many bytes, until a moment of the monotonic clock: who sends one at a time gets no more time for it."""
    found = bytearray()
    while len(found) < size:
        peer.settimeout(_left(until))
        data = peer.recv(min(size - len(found), 1 << 20))
        if not data:
            raise ConnectionResetError("it has closed the connection")
        found += data
    return bytes(found)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
