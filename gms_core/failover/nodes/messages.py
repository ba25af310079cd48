"""What an engine tells its agent, what the agent tells the engine, and what agents tell each other: JSON."""

from __future__ import annotations

import msgspec

from gms_core.protocol.messages import Role


class Order(msgspec.Struct, frozen=True):
    """The engine's first line, to its agent's standard input.

    Attributes:
        engine: What people call the engine; the same on all nodes.
        node: Number of this node, from 0.
        nodes: How many there are.
        host: Where the agent of node 0 listens, and is called.
        port: As well.
        secret_file: See `gms_core.failover.nodes.secret`.
        patience_s: Seconds until the agents of all nodes have to be there.
        timeout_s: Seconds of silence after which a node is lost.
        pid: Of the process that has started the agent.
        process: Descriptor, a pidfd, of that process.
    """

    engine: str
    node: int
    nodes: int
    host: str
    port: int
    secret_file: str
    patience_s: float
    timeout_s: float
    pid: int = 0
    process: int = -1


class Gathered(msgspec.Struct, frozen=True, tag="gathered"):
    """All agents are there. To the engine, a line of the agent's standard output."""


class Over(msgspec.Struct, frozen=True, tag="over"):
    """The engine cannot go on, for this reason: the agent ends. To the engine."""

    code: str
    sentence: str
    hint: str = ""


Told = Gathered | Over


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first words of an agent that calls."""

    engine: str
    node: int
    nodes: int


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to that."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The other answer."""

    reason: str


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Nothing but that the node is there."""


class Departs(msgspec.Struct, frozen=True, tag="departs"):
    """The engine ends in order, on every node, within so many seconds."""

    grace_s: float


class Stands(msgspec.Struct, frozen=True, tag="stands"):
    """The role that the engine has now, for those who ask the servers of another node."""

    role: Role
    detail: str


Said = Hello | Welcome | Refused | Beat | Departs | Stands
