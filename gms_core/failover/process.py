"""This process as the device servers of its engine know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gms_core.client import Membership, connect


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """Which process of which engine this is, and which servers its engine's devices have.

    Attributes:
        cohort: The same random text in all processes of one instance of an engine.
        engine: What people call the engine.
        name: Which of its processes this is, such as ``api-server 0``.
        sockets: Of the servers of all devices of the engine, in the order of its ranks; the first one arbitrates the lock.
        deadline_s: Seconds without a sign of progress after which the servers end the engine; 0 for no such watch.
        serves: Whether this process accepts and answers requests.
        connect_timeout_s: Seconds to connect to a server.
    """

    cohort: str
    engine: str
    name: str
    sockets: tuple[Path, ...]
    deadline_s: float = 0.0
    serves: bool = True
    connect_timeout_s: float = 10.0

    def join(self, socket: Path, *, part: str = "", deadline_s: float = 0.0) -> Membership:
        """Open a session of its own with one of the servers, and join the cohort there.

        Args:
            socket: Of the server.
            part: What the session is for; shown after the process's name.
            deadline_s: Seconds without a beat of this session after which the engine is ended; 0 for no such watch.

        Raises:
            ServerUnavailable: No server answers there.
            CohortFenced: The server is ending this engine, or has ended it.
        """
        name = f"{self.name} ({part})" if part else self.name
        session = connect(socket_path=socket, client=f"{self.engine} {name}", timeout_s=self.connect_timeout_s)
        try:
            return Membership.join(session, self.cohort, self.engine, name, deadline_s=deadline_s, serves=self.serves)
        except BaseException:
            session.close()
            raise
