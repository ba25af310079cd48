"""The directory of the servers' sockets: where it is safe to put them, and when it is safe to connect to one.

Whoever may connect to a server may read the weights that engines of this user run with. So nobody else may enter the directory, unless a group was
allowed to, and nobody but this user, root, or a user that this process was told to trust may be behind a socket in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from gms_core.allowed import trusted_servers
from gms_core.config import settings
from gms_core.devices import HOST, DeviceId, device_id
from gms_core.errors import ConfigurationError, PermissionRefused, ProtocolError, ServerUnavailable

LONGEST_SOCKET_PATH = 107
"""Bytes: ``sun_path`` of unix(7) without its end."""
ANY_GROUP = -1
"""For `prepare`: whichever group the server has allowed."""


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


def prepare(directory: Path, group: int | None = None) -> Path:
    """Make the runtime directory, or check that the one that is there is safe.

    Its mode is 0700; with a group 0710: its members may reach what is in the directory and is open to them, and can neither add nor replace
    anything. A directory that is there may let them list it as well.

    Args:
        directory: Which.
        group: The group that may enter; None for nobody, `ANY_GROUP` for whichever it is.

    Raises:
        PermissionRefused: It is a link or no directory, it is another user's, or others may enter it, or may not who should. Nothing was changed.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            found = directory.lstat()
        else:
            try:
                directory.chmod(0o700)  # whatever the umask took away
                if group is not None and group != ANY_GROUP:
                    os.chown(directory, -1, group, follow_symlinks=False)
                    directory.chmod(0o710)
            except BaseException:
                directory.rmdir()
                raise
            found = directory.lstat()
    except OSError as error:
        raise PermissionRefused(
            f"the runtime directory {directory} cannot be made: {error.strerror}",
            hint="Set GMS_RUNTIME_DIR to a directory of this user." if group is None else "The server's user has to be in the group that it allows.",
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
        raise PermissionRefused(f"the runtime directory {directory} is {what}", hint="Remove it, or set GMS_RUNTIME_DIR to a real directory.")
    if found.st_uid != os.getuid():
        raise PermissionRefused(
            f"the runtime directory {directory} belongs to user {found.st_uid}, not to {os.getuid()}",
            hint="Set GMS_RUNTIME_DIR to a directory of this user.",
        )
    if refused := _refused_mode(directory, found, group):
        raise refused
    return directory


def _refused_mode(directory: Path, found: os.stat_result, group: int | None) -> PermissionRefused | None:
    mode = stat.S_IMODE(found.st_mode)
    if group is None:
        if mode & 0o077:
            return PermissionRefused(
                f"others may enter the runtime directory {directory}: its mode is {mode:04o}", hint=f"Run: chmod 700 {directory}"
            )
        return None
    if mode & 0o027:
        return PermissionRefused(
            f"the runtime directory {directory} is open to more than its group's entering it: its mode is {mode:04o}",
            hint=f"Run: chmod 710 {directory}",
        )
    if group != ANY_GROUP and (found.st_gid != group or not mode & 0o010):
        return PermissionRefused(
            f"group {group} may not enter the runtime directory {directory}: it is of group {found.st_gid}, with mode {mode:04o}",
            hint=f"Run: chgrp {group} {directory} && chmod 710 {directory}",
        )
    return None


def start_hint(path: Path) -> str:
    """How to start the server that is to listen at a path."""
    return f"Start it with: {'gms serve --device host' if path.name == f'{HOST}.sock' else 'gms serve'}"


def check_socket(path: Path) -> None:
    """Check, as a client, that it is safe to connect to a socket.

    Raises:
        ServerUnavailable: Nothing is there. The hint names the command that starts a server.
        ProtocolError: It is no socket.
        PermissionRefused: It is neither this user's nor root's nor that of the user whom ``GMS_SERVER_USER`` names; others may connect to it; or
            others may put another one in its place.
    """
    check_length(path)
    try:
        found, directory = path.stat(), path.resolve().parent.stat()
    except PermissionError as error:
        raise PermissionRefused(f"{path} may not be looked at by this user: {error.strerror}") from error
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is a circle of links"
        raise ServerUnavailable(f"no server listens at {path}: {reason}", hint=start_hint(path)) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise ProtocolError(f"{path} is not a socket", hint="Name the socket of a GMS server.")
    trusted = trusted_servers(settings().server_user)
    if found.st_uid not in trusted:
        raise untrusted(f"{path} belongs to user {found.st_uid}")
    mode = stat.S_IMODE(found.st_mode)
    for_a_group = mode & 0o077 == 0o060 and directory.st_gid == found.st_gid and directory.st_mode & 0o010
    if mode & 0o077 and not for_a_group:
        raise PermissionRefused(f"others may connect to {path}: its mode is {mode:04o}", hint=f"Run: chmod 600 {path}")
    if directory.st_uid not in trusted or (directory.st_mode & 0o022 and not directory.st_mode & stat.S_ISVTX):
        raise PermissionRefused(
            f"others may put another socket in the place of {path}: its directory is of user {directory.st_uid}, "
            f"with mode {stat.S_IMODE(directory.st_mode):04o}",
            hint=f"Let the directory be writable for its owner alone: chmod go-w {path.parent}",
        )


def untrusted(what: str) -> PermissionRefused:
    """The refusal of a server that is another user's."""
    told = settings().server_user
    also = "" if told is None else f", nor user {told}, which GMS_SERVER_USER names"
    return PermissionRefused(
        f"{what}, which is neither this user nor root{also}",
        hint="If that user is to be trusted with what this process computes, set GMS_SERVER_USER to it." if told is None else "",
    )
