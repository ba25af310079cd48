"""A node's part of an engine, in the process that begins it there: it starts the part's agent, and lives no longer than that."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gms_core.config import settings
from gms_core.engine_log import log
from gms_core.errors import AcquireTimeout, ConnectionLost, GmsError
from gms_core.failover.front_end import named
from gms_core.failover.nodes.agent import DEPART, JOIN, NAME, STAND
from gms_core.failover.nodes.messages import Gathered, Order, Over, Told
from gms_core.failover.nodes.secret import read_secret
from gms_core.protocol.messages import Role

if TYPE_CHECKING:
    from gms_core.engine_config import NodesConfig

_part: Part | None = None


def begin_part(config: NodesConfig, *, node: int, nodes: int, host: str) -> Part:
    """Begin this node's part of an engine, in the process that begins it here. The cohort is in the environment.

    Args:
        config: As the user has it.
        node: Number of this node, from 0.
        nodes: How many there are.
        host: Where the agent of node 0 listens, and is called.

    Raises:
        ConfigurationError: The secret cannot be used.
        ConnectionLost: The agent cannot be started.
    """
    global _part
    read_secret(config.secret_file)  # a mistake is known before anything is started
    _part = Part(Order(settings().engine, node, nodes, host, config.port, str(config.secret_file), config.patience_s, config.timeout_s))
    return _part


def begun_part() -> Part | None:
    """The part of an engine over several nodes that this process has begun; None if there is none."""
    return _part


class Part:
    """This node's part, from before anything of it is started until its end. The cohort is in the environment."""

    def __init__(self, order: Order) -> None:
        """Start the agent. From now on this process ends with it, by SIGKILL: it would not learn that the rest of its engine has ended.

        Args:
            order: What the agent is to know; ``pid`` and ``process`` are filled in here.

        Raises:
            ConnectionLost: It cannot be started.
        """
        self._order = order
        self._gathered = threading.Event()
        self._roles: queue.SimpleQueue[tuple[Role, str]] = queue.SimpleQueue()
        me = os.pidfd_open(os.getpid())
        try:
            self._agent = subprocess.Popen(
                [sys.executable, "-P", "-m", "gms_core.failover.nodes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(me,),
                start_new_session=True,  # a Ctrl-C is for the engine: its agent ends after it
            )
            assert self._agent.stdin is not None
            with self._agent.stdin as orders:
                orders.write(msgspec.json.encode(msgspec.structs.replace(order, pid=os.getpid(), process=me)) + b"\n")
        except OSError as error:
            raise ConnectionLost(f"the agent of {order.engine} cannot be started: {error}") from error
        finally:
            os.close(me)
        for work in (self._listen, self._tell_roles):
            threading.Thread(target=work, name="gms-agent", daemon=True).start()

    @property
    def agent_pid(self) -> int:
        """Of the agent's process."""
        return self._agent.pid

    def until_gathered(self) -> None:
        """Wait until the agents are there of all nodes, or, elsewhere than on the first node, the first one's. Deaths are not missed from then on.

        Raises:
            AcquireTimeout: They are not, within the agents' patience and a little more.
        """
        if not self._gathered.wait(self._order.patience_s + self._order.timeout_s):
            raise AcquireTimeout(f"the agents of the {self._order.nodes} nodes of {self._order.engine} are not all there")

    def stands(self, role: Role, detail: str) -> None:
        """The engine has this role from now on: tell the servers of the other nodes. Returns at once."""
        self._roles.put((role, detail))

    def depart(self, grace_s: float) -> None:
        """The whole engine ends in order: tell the servers of all nodes, before anything of it ends. What cannot be told ends otherwise."""
        try:
            named.tell(NAME, 0, named.Order(call=DEPART, arguments=(grace_s,)), self._order.timeout_s)
        except GmsError as error:
            log().warning("the other nodes of %s were not told of its end: %s", self._order.engine, error)

    def _tell_roles(self) -> None:
        while True:
            try:
                named.tell(NAME, 0, named.Order(call=STAND, arguments=self._roles.get()))
            except GmsError as error:
                log().debug("the other nodes of %s were not told of its role: %s", self._order.engine, error)

    def _listen(self) -> None:
        assert self._agent.stdout is not None
        for line in self._agent.stdout:
            match msgspec.json.decode(line, type=Told):
                case Gathered():
                    self._gathered.set()
                case Over(_, sentence):
                    log().error("%s ends: %s", self._order.engine, sentence)
        os.kill(os.getpid(), signal.SIGKILL)


def join_agent(socket: Path, connect_timeout_s: float) -> None:
    """Have the agent of this node join the engine's cohort on the server of one of its ranks, which calls this. Idempotent.

    Raises:
        PermissionRefused: It could not; says why.
        ConnectionLost: It is not there.
    """
    named.tell(NAME, 0, named.Order(call=JOIN, arguments=(str(socket), connect_timeout_s)))
