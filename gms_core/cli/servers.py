"""Asks the servers of a runtime directory for their state, dead ones included."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gms_core.cli.refusal import as_dict
from gms_core.client import connect
from gms_core.devices import HOST
from gms_core.errors import GmsError, ServerUnavailable
from gms_core.protocol.messages import StatusReport
from gms_core.runtime_dir import sockets

CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class ServerState:
    """What one socket answered: a report, or why there is none."""

    socket: Path
    report: StatusReport | None = None
    error: GmsError | None = None

    @property
    def silence(self) -> str:
        """Why there is no report, in a sentence."""
        return f"the server of {self.socket.stem} cannot be asked: {self.error.message}" if self.error is not None else ""

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


def states(runtime_dir: Path, client: str, devices: tuple[str, ...] = ()) -> list[ServerState]:
    """What the sockets answer: those of some devices, or all.

    Raises:
        ServerUnavailable: One that is named does not answer, or none does.
    """
    found = [ask(path, client) for path in sockets(runtime_dir, devices)]
    silent = [state.error for state in found if state.error is not None]
    if len(silent) == len(found) or (devices and silent):
        why = silent[0].message if silent else f"no server has a socket in {runtime_dir}"
        raise ServerUnavailable(why, hint="gms status shows the servers; gms serve starts them.")
    return found


def reports(runtime_dir: Path, client: str, devices: tuple[str, ...] = ()) -> list[StatusReport]:
    """What the servers say: those of some devices, or all that answer.

    Raises:
        ServerUnavailable: One that is named does not answer, or none does.
    """
    return [state.report for state in states(runtime_dir, client, devices) if state.report is not None]


def all_reports(runtime_dir: Path, client: str, devices: tuple[str, ...] = ()) -> list[StatusReport]:
    """What the servers say, before something is changed on all of them: none may be left out without a word.

    Raises:
        ServerUnavailable: One of them does not answer.
    """
    found = states(runtime_dir, client, devices)
    if silent := [state.silence for state in found if state.silence]:
        raise ServerUnavailable(
            f"nothing is changed, since {'; '.join(silent)}",
            hint="Name the devices that are meant with --device to leave it out; gms status shows all servers.",
        )
    return [state.report for state in found if state.report is not None]


def is_meant(pool: str, device: str, name: str, *, ranks: bool) -> bool:
    """Whether a pool of a device is the one of a name or, where ``ranks`` are meant too, that of a further rank.

    On the device host each rank of an engine has a pool of its own: NAME, NAME.1, NAME.2 and so on. Only who knows that these are ranks can say so:
    another model's pool may be called alike.
    """
    return pool == name or (ranks and device == HOST and re.fullmatch(re.escape(name) + r"\.[1-9][0-9]*", pool) is not None)
