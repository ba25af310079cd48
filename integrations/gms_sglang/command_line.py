"""What GMS adds to a command line of SGLang. It imports no SGLang."""

from __future__ import annotations

from collections.abc import Sequence

from gms_core.plugins.command_lines import server_options, with_load_format

SERVER_MODULE = "sglang.launch_server"
PORT = 30000
"""Where a server answers if the command line does not say."""


def with_gms(command: Sequence[str]) -> list[str] | None:
    """A command that serves with SGLang, with the load format that it needs; None if it is no such command.

    Raises:
        ConfigurationError: It names another load format.
    """
    options = server_options(command, program="sglang", server_module=SERVER_MODULE, cli_module="sglang.cli.main")
    return None if options is None else with_load_format(command, options, shortest="--load-f")
