"""`gms run` on each of several nodes: which part of each engine is started here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gms_core.errors import InvalidArgument

if TYPE_CHECKING:
    from gms_core.plugins.engines import EngineAdapter

Command = TypeVar("Command", bound=Callable[..., Any])

_HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Nodes:
    """This node, as the options of `gms run` say.

    Attributes:
        count: Of nodes.
        node: The number of this one.
        host: The first one's address.
        meeting_port: Where the ranks of the engine of number 0 meet; each further engine has the next port.
        agents_port: Where the agents of that engine meet; likewise.
        secret: File with what the agents know.
    """

    count: int
    node: int
    host: str
    meeting_port: int
    agents_port: int
    secret: Path

    def block(self, number: int) -> dict[str, object]:
        """The key ``nodes`` of the failover block of an engine."""
        return {"secret_file": str(self.secret), "port": self.agents_port + number}

    def command(self, adapter: EngineAdapter | None, command: Sequence[str], number: int) -> list[str]:
        """What starts this node's part of an engine.

        Raises:
            InvalidArgument: Such engines do not fail over over several nodes.
            ConfigurationError: The command says something of nodes itself.
        """
        from gms_core.plugins.engines import NodePlace

        if adapter is None or adapter.over_nodes is None:
            kind = "this command" if adapter is None else adapter.name
            raise InvalidArgument(f"--nnodes: {kind} starts no engine that fails over over several nodes", hint="vLLM's `vllm serve` does.")
        return adapter.over_nodes(command, NodePlace(self.count, self.node, self.host, self.meeting_port + number))


def options(command: Command) -> Command:
    """The options of `gms run` for this."""
    for option in reversed(
        (
            click.option("--nnodes", type=click.IntRange(1, 1024), default=1, show_default=True, help="Nodes that the ranks of each engine are on."),
            click.option("--node-rank", type=click.IntRange(0, 1023), help="Number of this node, from 0. Clients come to node 0."),
            click.option("--master-addr", metavar="HOST", help="Address of node 0, for all nodes."),
            click.option(
                "--master-port",
                type=click.IntRange(1, _HIGHEST_PORT),
                default=29500,
                show_default=True,
                help="Where the ranks of engine 0 meet there; those of engine 1 meet at the next port.",
            ),
            click.option(
                "--agents-port",
                type=click.IntRange(1, _HIGHEST_PORT),
                default=29600,
                show_default=True,
                help="Where the nodes' agents of engine 0 meet; those of engine 1 meet at the next port.",
            ),
            click.option("--secret", type=click.Path(path_type=Path), metavar="FILE", help="What agents prove to each other that they know."),
        )
    ):
        command = option(command)
    return command


def nodes_of(
    count: int, node: int | None, host: str | None, meeting_port: int, agents_port: int, secret: Path | None, *, engines: int
) -> Nodes | None:
    """What the options say; None for one node.

    Args:
        count: As in `Nodes`, and so on.
        node: As well.
        host: As well.
        meeting_port: As well.
        agents_port: As well.
        secret: As well.
        engines: How many there may be.

    Raises:
        InvalidArgument: They do not go together.
        ConfigurationError: The secret cannot be used.
    """
    from gms_core.failover.nodes.secret import read_secret

    needed = {"--node-rank": node, "--master-addr": host, "--secret": secret}
    if count == 1:
        if given := [name for name, value in needed.items() if value is not None]:
            raise InvalidArgument(f"{given[0]} is for engines over several nodes", hint="Say how many there are with --nnodes.")
        return None
    if node is None or host is None or secret is None:
        missing = next(name for name, value in needed.items() if value is None)
        raise InvalidArgument(f"--nnodes {count} needs {missing}")
    if node >= count:
        raise InvalidArgument(f"--node-rank {node}: the nodes are 0 to {count - 1}")
    if abs(meeting_port - agents_port) < engines or max(meeting_port, agents_port) + engines - 1 > _HIGHEST_PORT:
        raise InvalidArgument(f"{engines} engines need that many ports each, from --master-port and from --agents-port on")
    read_secret(secret)
    return Nodes(count, node, host, meeting_port, agents_port, secret.absolute())
