"""What GMS adds to a command line of vLLM. It imports no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from gms_core.plugins.command_lines import server_options, with_load_format, without
from gms_core.plugins.engines import NodePlace

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
CLI_MODULE = "vllm.entrypoints.cli.main"
_OF_NODES = ("--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless")


def with_gms(command: Sequence[str]) -> list[str] | None:
    """A command that serves with vLLM, with the load format that it needs; None if it is no such command.

    Raises:
        ConfigurationError: It names another load format.
    """
    options = server_options(command, program="vllm", server_module=SERVER_MODULE, cli_module=CLI_MODULE)
    return None if options is None else with_load_format(command, options, shortest="--loa")


def over_nodes(command: Sequence[str], place: NodePlace) -> list[str]:
    """A command that `with_gms` has returned, for one node's part of an engine.

    Raises:
        ConfigurationError: It says something of nodes itself.
    """
    options = server_options(command, program="vllm", server_module=SERVER_MODULE, cli_module=CLI_MODULE)
    without(options or (), _OF_NODES, hint="Say it to gms run, which says it to the engine: --nnodes, --node-rank, --master-addr, --master-port.")
    words = ["--nnodes", str(place.nodes), "--node-rank", str(place.node), "--master-addr", place.host, "--master-port", str(place.port)]
    return [*command, *words, *(["--headless"] if place.node else [])]
