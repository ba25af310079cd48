"""What GMS adds to a command line of vLLM. It imports no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from gms_core.plugins.command_lines import server_options, with_load_format

SERVER_MODULE = "vllm.entrypoints.openai.api_server"


def with_gms(command: Sequence[str]) -> list[str] | None:
    """A command that serves with vLLM, with the load format that it needs; None if it is no such command.

    Raises:
        ConfigurationError: It names another load format.
    """
    options = server_options(command, program="vllm", server_module=SERVER_MODULE, cli_module="vllm.entrypoints.cli.main")
    return None if options is None else with_load_format(command, options, shortest="--loa")
