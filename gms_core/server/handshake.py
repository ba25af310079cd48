"""What a client's first message must say for a session to be made. No I/O."""

from __future__ import annotations

from gms_core import __version__
from gms_core.errors import VersionMismatch, WrongDevice
from gms_core.protocol.messages import PROTOCOL_VERSIONS, Hello, common_version


def agreed_version(hello: Hello, device: str) -> int:
    """The version of the protocol that both sides speak from now on.

    Args:
        hello: The client's first message.
        device: Of this server.

    Raises:
        VersionMismatch: There is none.
        WrongDevice: The client wants the memory of another device.
    """
    if not (version := common_version(hello.versions)):
        raise VersionMismatch(
            f"this server (gms {__version__}) speaks the protocol versions {list(PROTOCOL_VERSIONS)}, the client {list(hello.versions)}",
            hint="Install the same version of gms in the engine's environment as the server runs.",
        )
    if hello.device and hello.device != device:
        raise WrongDevice(f"this server owns the memory of {device}, not of {hello.device}")
    return version
