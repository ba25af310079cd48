"""What GMS adds to a command line of vLLM. It imports no vLLM."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gms_core.errors import ConfigurationError

LOAD_FORMAT = "gms"
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
_HINT = (
    "Leave --load-format out. What reads the checkpoint is the key inner of the block gms: "
    '--model-loader-extra-config \'{"gms": {"inner": "safetensors"}}\'.'
)


def with_gms(command: Sequence[str]) -> list[str] | None:
    """A command that serves with vLLM, with the load format that it needs; None if it is no such command.

    It may stand behind others, such as ``numactl`` or ``uv run``, but not inside of a shell's text.

    Raises:
        ConfigurationError: It names another load format.
    """
    options = _options(command)
    if options is None:
        return None
    formats = list(_load_formats(options)) or list(_load_formats_of_file(options))
    other = next((name for name in formats if name.lower() != LOAD_FORMAT), None)
    if other is not None:
        raise ConfigurationError(f"--load-format {other} does not share weights, which shadows need", hint=_HINT)
    return [*command] if formats else [*command, "--load-format", LOAD_FORMAT]


def _options(command: Sequence[str]) -> Sequence[str] | None:
    """What comes after the words that start the server."""
    for index, (word, following) in enumerate(itertools.pairwise(command)):
        if (Path(word).name, following) == ("vllm", "serve") or (word, following) == ("-m", SERVER_MODULE):
            return command[index + 2 :]
        if (word, following, *command[index + 2 : index + 3]) == ("-m", "vllm.entrypoints.cli.main", "serve"):
            return command[index + 3 :]
    return None


def _load_formats(options: Sequence[str]) -> Iterator[str]:
    yield from _values(options, "--load-format", shortest="--loa")


def _load_formats_of_file(options: Sequence[str]) -> Iterator[str]:
    """The load format in the file that ``--config`` names. One that cannot be read is for the engine to complain of."""
    for path in _values(options, "--config", shortest="--config"):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield from re.findall(r"^load[-_]format\s*:\s*['\"]?([\w.-]+)", text, flags=re.MULTILINE)


def _values(options: Sequence[str], name: str, *, shortest: str) -> Iterator[str]:
    """Values of an option, which vLLM takes with underscores, abbreviated, and after ``=`` too."""
    for index, word in enumerate(options):
        given, equals, value = word.partition("=")
        given = given.replace("_", "-")
        if given.startswith(shortest) and name.startswith(given):
            following = options[index + 1 : index + 2]
            yield from [value] if equals else following
