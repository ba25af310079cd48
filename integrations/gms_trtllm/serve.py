"""``gms-trtllm-serve``: TensorRT-LLM's own `trtllm-serve`, in a process that knows GMS, and with two more options.

`trtllm-serve` loads no plugins, and has no option for the load format: it takes a file of options for the engine. So the two go into such a file,
together with what the user's own file says.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import gms_trtllm
from gms_core.cli.refusal import Refusal
from gms_core.errors import ConfigurationError, EngineUnsupported, GmsError
from gms_trtllm.command_line import PROGRAM
from gms_trtllm.failover import begin, wanted
from gms_trtllm.options_file import Asked, merged, parse_block, read_file

_HOME = "tensorrt_llm.commands.serve"
_FILE_OPTION = "--extra_llm_api_options"


@click.command(
    PROGRAM,
    context_settings={"ignore_unknown_options": True},
    epilog="Everything else is handed to trtllm-serve as it is; see trtllm-serve --help.",
)
@click.option("--load-format", "--load_format", metavar="NAME", help="gms shares weights; any other is TensorRT-LLM's own.")
@click.option(
    "--gms-config",
    "--gms_config",
    "blocks",
    metavar="JSON|KEY=VALUE",
    multiple=True,
    help="What gms is told: socket_path, mode, tag. Can be repeated.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def main(load_format: str | None, blocks: Sequence[str], words: Sequence[str]) -> None:
    """Serve with TensorRT-LLM, and share weights through GMS."""
    try:
        command = _upstream()
        gms_trtllm.install()
        with _with_options(command, list(words), Asked(load_format, parse_block(blocks))) as handed:
            command.main(args=handed, prog_name=PROGRAM)
    except GmsError as error:
        raise Refusal(error, as_json=False, debug=False) from error


def _upstream() -> click.Command:
    """The command that serves.

    Raises:
        EngineUnsupported: TensorRT-LLM is not there, or serves otherwise.
    """
    try:
        home = importlib.import_module(_HOME)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorrt_llm":
            raise EngineUnsupported(f"TensorRT-LLM cannot be imported: {error}", hint="Install what it needs.") from error
        if error.name == "tensorrt_llm":
            raise EngineUnsupported(
                "TensorRT-LLM is not installed in this environment", hint="pip install tensorrt-llm, or use its container."
            ) from error
        raise EngineUnsupported(
            f"expected {_HOME}:main to be there, found no module {error.name}", hint="Use a version that has trtllm-serve."
        ) from error
    except ImportError as error:
        raise EngineUnsupported(
            f"TensorRT-LLM cannot be imported: {error}", hint="Its libraries have to be found; on most machines it is run in its container."
        ) from error
    found = getattr(home, "main", None)
    if not isinstance(found, click.Command):
        raise EngineUnsupported(
            f"expected {_HOME}:main to be a command of click, found {'nothing' if found is None else f'a {type(found).__name__}'}",
            hint="Use a version that this adapter knows.",
        )
    return found


@contextmanager
def _with_options(command: click.Command, words: list[str], asked: Asked) -> Iterator[list[str]]:
    """The words for TensorRT-LLM; what was asked for is in a file as long as this lasts.

    Raises:
        ConfigurationError: It cannot be said to this command, or contradicts the user's file, or is no block of GMS's.
    """
    named = _file_options(command, words)
    rest, file = _take_out(words, named)
    options = merged(read_file(file), asked, file or "")
    if options is None:
        yield words
        return
    if not named:
        raise ConfigurationError(
            f"trtllm-serve {words[0]} takes no options of an engine, so it cannot be told to share weights",
            hint="Write load_format: GMS, and gms_config, into its own file of configuration.",
        )
    _check_block(options)
    if str(options.get("load_format")).upper() == "GMS":
        rest = _held(command, rest)
    with tempfile.TemporaryDirectory(prefix="gms-trtllm-") as folder:
        path = Path(folder, "options.yaml")
        path.write_text(json.dumps(options, indent=1), encoding="utf-8")  # which is YAML too
        yield [*rest, _FILE_OPTION if _FILE_OPTION in named else named[0], str(path)]


def _held(command: click.Command, words: list[str]) -> list[str]:
    """Begin an engine that fails over, if it does; returns the words for TensorRT-LLM, which binds a port of its own then, and never listens there.

    Raises:
        GmsError: The engine cannot fail over, or cannot have its lock or its address.
    """
    failover = wanted()
    if failover is None:
        return words
    defaults = {name: parameter.default for parameter in _chosen(command, words).params for name in parameter.opts}
    _, host = _take_out(words, ["--host"])
    rest, port = _take_out(words, ["--port"])
    port = str(defaults.get("--port")) if port is None else port
    if not port.isdecimal():
        raise ConfigurationError(f"--port {port} is no port")
    from gms_trtllm.hold import hold_servers

    begin(failover, host or str(defaults.get("--host")), int(port), words)
    hold_servers()
    return [*rest, "--port", "0"]


def _chosen(command: click.Command, words: Sequence[str]) -> click.Command:
    """The command that these words start."""
    commands: Mapping[str, click.Command] = getattr(command, "commands", {})
    return commands.get(words[0] if words else "") or commands.get("serve") or command


def _file_options(command: click.Command, words: Sequence[str]) -> list[str]:
    """Names of the option for a file of options for the engine, of the command that these words start; empty if it has none."""
    return next((list(found.opts) for found in _chosen(command, words).params if _FILE_OPTION in found.opts), [])


def _take_out(words: Sequence[str], named: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without an option, and its value; the last one counts."""
    rest, value = [], None
    left = iter(words)
    for word in left:
        name, equals, after = word.partition("=")
        if name not in named:
            rest.append(word)
        elif equals:
            value = after
        else:
            value = next(left, None)
    return rest, value


def _check_block(options: Mapping[str, Any]) -> None:
    """Say what is wrong with a block now, in a sentence, and not once TensorRT-LLM has started.

    Raises:
        ConfigurationError: A key is unknown or a value is wrong.
    """
    import tensorrt_llm.llmapi.llm as programs
    from pydantic import ValidationError

    kind = programs.TorchLlmArgs.model_fields["gms_config"].annotation
    try:
        kind.model_validate(options.get("gms_config", {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ") for problem in error.errors())
        raise ConfigurationError(f"gms_config: {problems}", hint=f"The options are {', '.join(kind.model_fields)}.") from error
