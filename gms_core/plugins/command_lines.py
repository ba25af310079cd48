"""Command lines of engines: which load format they name, and how the one that shares weights is added. No engine is imported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gms_core.errors import ConfigurationError

LOAD_FORMAT = "gms"
_HINT = (
    "Leave --load-format out. What reads the checkpoint is the key inner of the block gms: "
    '--model-loader-extra-config \'{"gms": {"inner": "safetensors"}}\'.'
)


def server_options(command: Sequence[str], *, program: str, server_module: str, cli_module: str) -> Sequence[str] | None:
    """What comes after the words of a command that start an engine's server; None if it starts none.

    These may stand behind others, such as ``numactl`` or ``uv run``, but not inside of a shell's text.

    Args:
        command: All its words.
        program: The engine's program, which serves when it is told ``serve``.
        server_module: The module that serves.
        cli_module: The module of the program.
    """
    for index, (word, following) in enumerate(itertools.pairwise(command)):
        if (Path(word).name, following) == (program, "serve") or (word, following) == ("-m", server_module):
            return command[index + 2 :]
        if (word, following, *command[index + 2 : index + 3]) == ("-m", cli_module, "serve"):
            return command[index + 3 :]
    return None


def with_load_format(
    command: Sequence[str], options: Sequence[str], *, shortest: str, files: Sequence[str] = ("--config",), hint: str = _HINT
) -> list[str]:
    """A command with the load format that shares weights.

    Args:
        command: All its words.
        options: Those that come after the words which start the server.
        shortest: The shortest abbreviation of ``--load-format`` that the engine takes for it.
        files: Options that name a file of options.
        hint: What to do if it names another one.

    Raises:
        ConfigurationError: It names another load format.
    """
    formats = list(_values(options, "--load-format", shortest=shortest)) or list(_load_formats_of_file(options, files))
    other = next((name for name in formats if name.lower() != LOAD_FORMAT), None)
    if other is not None:
        raise ConfigurationError(f"--load-format {other} does not share weights, which shadows need", hint=hint)
    return [*command] if formats else [*command, "--load-format", LOAD_FORMAT]


def without(options: Sequence[str], names: Sequence[str], *, hint: str) -> None:
    """Make sure that options are not given, abbreviated or not.

    Args:
        options: Those that come after the words which start the server.
        names: In full, such as ``--node-rank``. An abbreviation has at least one letter more than ``--n``.
        hint: What to do if one is.

    Raises:
        ConfigurationError: One is.
    """
    for word in options:
        given = word.partition("=")[0].replace("_", "-")
        if any(len(given) > len("--n") and name.startswith(given) for name in names):
            raise ConfigurationError(f"the command says {word} itself", hint=hint)


def _load_formats_of_file(options: Sequence[str], files: Sequence[str]) -> Iterator[str]:
    """The load format in the file that an option names. One that cannot be read is for the engine to complain of."""
    for path in itertools.chain.from_iterable(_values(options, name, shortest=name) for name in files):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield from re.findall(r"^load[-_]format\s*:\s*['\"]?([\w.-]+)", text, flags=re.MULTILINE)


def _values(options: Sequence[str], name: str, *, shortest: str) -> Iterator[str]:
    """Values of an option, which engines take with underscores, abbreviated, and after ``=`` too."""
    for index, word in enumerate(options):
        given, equals, value = word.partition("=")
        given = given.replace("_", "-")
        if given.startswith(shortest) and name.startswith(given):
            following = options[index + 1 : index + 2]
            yield from [value] if equals else following
