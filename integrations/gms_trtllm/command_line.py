"""What GMS adds to a command line of TensorRT-LLM. It imports no TensorRT-LLM."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from gms_core.errors import ConfigurationError
from gms_core.plugins.command_lines import with_load_format

PROGRAM = "gms-trtllm-serve"
_UPSTREAM = "trtllm-serve"


def with_gms(command: Sequence[str]) -> list[str] | None:
    """A command that serves with TensorRT-LLM, with the load format that it needs; None if it is no such command.

    Raises:
        ConfigurationError: It names another load format, or starts `trtllm-serve` by itself, which cannot share weights.
    """
    for index, word in enumerate(command):
        if Path(word).name == _UPSTREAM:
            raise ConfigurationError(f"{_UPSTREAM} loads no plugins, so it cannot share weights", hint=f"Write {PROGRAM} in its place.")
        if Path(word).name == PROGRAM:
            return _with_load_format(command, index + 1)
    for index, words in enumerate(itertools.pairwise(command)):
        if words == ("-m", "gms_trtllm") and "serve" in command[index + 2 : index + 3]:
            return _with_load_format(command, index + 3)
    return None


def _with_load_format(command: Sequence[str], first: int) -> list[str]:
    return with_load_format(
        command,
        command[first:],
        shortest="--load-format",
        files=("--extra-llm-api-options", "--config"),
        hint="Leave the load format out: what reads the checkpoint is the option checkpoint_format.",
    )
