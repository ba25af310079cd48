"""What GMS adds to a command line of vLLM. It imports no vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from gms_core.plugins.command_lines import with_load_format

SERVER_MODULE = "vllm.entrypoints.openai.api_server"


def with_gms(command: Sequence[str]) -> list[str] | None:
    """A command that serves with vLLM, with the load format that it needs; None if it is no such command.

    It may stand behind others, such as ``numactl`` or ``uv run``, but not inside of a shell's text.

    Raises:
        ConfigurationError: It names another load format.
    """
    options = _options(command)
    return None if options is None else with_load_format(command, options, shortest="--loa")


def _options(command: Sequence[str]) -> Sequence[str] | None:
    """What comes after the words that start the server."""
    for index, (word, following) in enumerate(itertools.pairwise(command)):
        if (Path(word).name, following) == ("vllm", "serve") or (word, following) == ("-m", SERVER_MODULE):
            return command[index + 2 :]
        if (word, following, *command[index + 2 : index + 3]) == ("-m", "vllm.entrypoints.cli.main", "serve"):
            return command[index + 3 :]
    return None
