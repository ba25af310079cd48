"""The directory of the servers' sockets: where it is safe to put them, and when it is safe to connect to one.

Whoever may connect to a server may read and replace the weights that engines of this user run with. So nobody else may enter the directory, and
nobody but this user or root may be behind a socket in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from gms_core.config import settings
from gms_core.devices import HOST, DeviceId, device_id
from gms_core.errors import ConfigurationError, PermissionRefused, ProtocolError, ServerUnavailable

LONGEST_SOCKET_PATH = 107
"""Bytes: ``sun_path`` of unix(7) without its end."""


def socket_path(device: DeviceId, directory: Path | None = None) -> Path:
    """Where the server of a device listens.

    Args:
        device: Whose server.
        directory: The runtime directory; None for the one of the settings.

    Raises:
        ConfigurationError: The path is too long for a socket.
    """
    path = (settings().runtime_dir if directory is None else directory) / f"{device}.sock"
    check_length(path)
    return path


def lock_path(socket: Path) -> Path:
    """The file that the server of a socket locks for as long as it lives."""
    return socket.with_suffix(".lock")


def keeper_path(socket: Path) -> Path:
    """Where the keeper of the server of a socket listens. It is there for as long as another server may go on with what the last one had."""
    return socket.with_suffix(".keep")


def journal_path(socket: Path) -> Path:
    """Where the server of a socket writes down what the next one has to know."""
    return socket.with_suffix(".journal")


def sockets(directory: Path, devices: Sequence[str] = ()) -> list[Path]:
    """Sockets of the servers in a runtime directory, dead ones included: those of the named devices, or all.

    Raises:
        InvalidArgument: No device can have one of the names.
        PermissionRefused: The directory may not be read.
    """
    if devices:
        return [socket_path(device_id(device), directory) for device in devices]
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".sock")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PermissionRefused(f"the runtime directory {directory} cannot be read: {error.strerror}") from error


def check_length(path: Path) -> None:
    """Raise `ConfigurationError` if a path is too long for a socket."""
    length = len(os.fsencode(path))
    if length > LONGEST_SOCKET_PATH:
        raise ConfigurationError(
            f"the socket's path {path} has {length} bytes, more than the {LONGEST_SOCKET_PATH} that a socket can have",
            hint="Set GMS_RUNTIME_DIR to a shorter path.",
        )


def prepare(directory: Path) -> Path:
    """Make the runtime directory with mode 0700, or check that the one that is there is safe.

    Raises:
        PermissionRefused: It is a link or no directory, it is another user's, or others may enter it. Nothing was changed.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            found = directory.lstat()
        else:
            directory.chmod(0o700)  # whatever the umask took away
            found = directory.lstat()
    except OSError as error:
        raise PermissionRefused(
            f"the runtime directory {directory} cannot be made: {error.strerror}", hint="Set GMS_RUNTIME_DIR to a directory of this user."
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
        raise PermissionRefused(f"the runtime directory {directory} is {what}", hint="Remove it, or set GMS_RUNTIME_DIR to a real directory.")
    if found.st_uid != os.getuid():
        raise PermissionRefused(
            f"the runtime directory {directory} belongs to user {found.st_uid}, not to {os.getuid()}",
            hint="Set GMS_RUNTIME_DIR to a directory of this user.",
        )
    if found.st_mode & 0o077:
        raise PermissionRefused(
            f"others may enter the runtime directory {directory}: its mode is {stat.S_IMODE(found.st_mode):04o}", hint=f"Run: chmod 700 {directory}"
        )
    return directory


def start_hint(path: Path) -> str:
    """How to start the server that is to listen at a path."""
    return f"Start it with: {'gms serve --device host' if path.name == f'{HOST}.sock' else 'gms serve'}"


def check_socket(path: Path) -> None:
    """Check, as a client, that it is safe to connect to a socket.

    Raises:
        ServerUnavailable: Nothing is there. The hint names the command that starts a server.
        ProtocolError: It is no socket.
        PermissionRefused: It is neither this user's nor root's, or others may connect to it.
    """
    check_length(path)
    try:
        found = path.stat()
    except PermissionError as error:
        raise PermissionRefused(f"{path} may not be looked at by this user: {error.strerror}") from error
    except OSError as error:
        raise ServerUnavailable(f"no server listens at {path}: {error.strerror}", hint=start_hint(path)) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise ProtocolError(f"{path} is not a socket", hint="Name the socket of a GMS server.")
    if found.st_uid not in (os.getuid(), 0):
        raise PermissionRefused(f"{path} belongs to user {found.st_uid}, which is neither this user nor root")
    if found.st_mode & 0o077:
        raise PermissionRefused(f"others may connect to {path}: its mode is {stat.S_IMODE(found.st_mode):04o}", hint=f"Run: chmod 600 {path}")
