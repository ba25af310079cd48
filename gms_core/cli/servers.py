"""Asks the servers of a runtime directory for their state, dead ones included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from gms_core.cli.refusal import as_dict
from gms_core.client import connect
from gms_core.errors import GmsError
from gms_core.protocol.messages import StatusReport

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


def ask(path: Path, client: str) -> ServerState:
    """Ask one server for its state, under this name."""
    try:
        with connect(socket_path=path, client=client, timeout_s=CONNECT_S) as session:
            return ServerState(path, report=session.status())
    except GmsError as error:
        return ServerState(path, error=error)
