"""Asks the servers of a runtime directory for their state, dead ones included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gms_core.cli.refusal import as_dict
from gms_core.client import connect
from gms_core.devices import DeviceId
from gms_core.errors import GmsError, PermissionRefused
from gms_core.protocol.messages import StatusReport
from gms_core.runtime_dir import socket_path

CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class ServerState:
    """What one socket answered: a report, or why there is none."""

    socket: Path
    report: StatusReport | None = None
    error: GmsError | None = None

    def as_dict(self) -> dict[str, object]:
        """The form in JSON output."""
        if self.report is not None:
            fields = msgspec.to_builtins(self.report)
            del fields["type"]
            return {"socket": str(self.socket), "state": "up", **fields}
        return {"socket": str(self.socket), "state": "dead", "device": self.socket.stem, "error": as_dict(self.error) if self.error else None}


def sockets(directory: Path, devices: Sequence[str] = ()) -> list[Path]:
    """Sockets to ask: those of the named devices, or all of the directory.

    Raises:
        PermissionRefused: The directory may not be read.
    """
    if devices:
        return [socket_path(DeviceId(device), directory) for device in devices]
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".sock")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PermissionRefused(f"the runtime directory {directory} cannot be read: {error.strerror}") from error


def ask(path: Path, client: str) -> ServerState:
    """Ask one server for its state, under this name."""
    try:
        with connect(socket_path=path, client=client, timeout_s=CONNECT_S) as session:
            return ServerState(path, report=session.status())
    except GmsError as error:
        return ServerState(path, error=error)
