"""The reference pages name all that the code has, and nothing that it has not."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gms_core import config, errors
from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode, for_type
from gms_core.engine_config import FailoverConfig, GmsConfig, NodesConfig
from gms_core.events import Kind
from gms_core.metrics.table import METRICS
from gms_core.metrics.transfers import TRANSFER_METRICS
from gms_core.plugins import hookspecs

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
DEVELOPMENT_VARIABLES = {"GMS_CPU_VLLM"}
"""Variables of the development scripts, which gms itself does not read."""
TOLD_VARIABLES = {"GMS_ROLE", "GMS_TERM", "GMS_EPOCH", "GMS_ADDRESS"}
"""Variables that gms sets for the command of `on_promoted`, and does not read."""


def _sections(page: str) -> dict[str, str]:
    """Text of a page by its headings of the second level, without backquotes; the text before the first one is under the empty name."""
    pieces = re.split(r"^## (.*)$", (REFERENCE / page).read_text(), flags=re.MULTILINE)
    return dict(zip(["", *(heading.replace("`", "") for heading in pieces[1::2])], pieces[::2], strict=True))


def _rows(text: str) -> list[list[str]]:
    """Cells of all table rows, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for index, line in enumerate(lines) if not _is_heading(lines, index)]


def _is_heading(lines: list[str], index: int) -> bool:
    return lines[index].startswith("|---") or (index + 1 < len(lines) and lines[index + 1].startswith("|---"))


def _commands(group: click.Group, prefix: str) -> dict[str, click.Command]:
    context = click.Context(group)
    found: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found |= _commands(command, f"{prefix} {name}") if isinstance(command, click.Group) else {f"{prefix} {name}": command}
    return found


def _options(command: click.Command) -> set[str]:
    """Names of options, and of arguments as the help shows them."""
    return {name for parameter in command.params for name in (parameter.opts if isinstance(parameter, click.Option) else [_name(parameter)])}


def _name(argument: click.Parameter) -> str:
    return (argument.name or "").upper()


def _documented_options(text: str) -> set[str]:
    return {name for row in _rows(text) for name in re.findall(r"`(-{1,2}[a-z-]+|[A-Z]+)`", row[0])}


@pytest.fixture(autouse=True)
def own_plugins_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "vllm")


def test_hooks_page_is_complete_when_hooks_change() -> None:
    specs = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("gms_")}
    expected = {f"`{name}({', '.join(inspect.signature(spec).parameters)})`" for name, spec in specs.items()}
    assert {row[0] for row in _rows(_sections("hooks.md")[""])} == expected
    for spec in specs.values():
        assert re.fullmatch(r"[A-Z][^.]*\.", inspect.getdoc(spec) or ""), "each hook is one sentence"


def test_errors_page_is_complete_when_errors_change() -> None:
    expected = {
        f"`{code}`": [kind.__name__, "yes" if kind.retryable else "no", str(int(for_type(kind)))]
        for code, kind in errors.error_types().items()
        if kind.__module__ == errors.__name__
    }
    found = {row[0]: [re.sub(r"&emsp;|`", "", row[1]), row[2], row[3]] for row in _rows((REFERENCE / "errors.md").read_text())}
    assert found == expected


def test_every_error_class_has_its_own_code_when_errors_change() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GmsError)]
    assert sorted(kind.code for kind in classes) == sorted(errors.error_types())


def test_exit_codes_table_is_complete_when_exit_codes_change() -> None:
    expected = []
    for code in ExitCode:
        kinds = sorted(name for name, kind in errors.error_types().items() if code and for_type(kind) is code)
        expected.append([str(int(code)), f"`{code.name}`", code.meaning, ", ".join(f"`{name}`" for name in kinds)])
    assert _rows(_sections("cli.md")["Exit codes"]) == expected


def test_events_table_is_complete_when_kinds_change() -> None:
    expected = [[f"`{kind}`", logging.getLevelName(kind.level), re.sub(r":\.?[0-9]*[fg]}", "}", kind.words)] for kind in Kind]
    assert _rows(_sections("events.md")[""]) == expected


def test_metrics_table_is_complete_and_alerts_name_what_there_is_when_metrics_change() -> None:
    sections = _sections("metrics.md")
    expected = [[f"`{name}`", one.kind, ", ".join(f"`{label}`" for label in one.labels) or "-", one.help] for name, one in METRICS.items()]
    assert _rows(sections[""]) == expected
    transfers = [[f"`{name}`", ", ".join(f"`{label}`" for label in one.labels) or "-", one.help] for name, one in TRANSFER_METRICS.items()]
    assert _rows(sections["Saves and restores"]) == transfers
    known = {name for name, one in METRICS.items() if one.kind != "histogram"}
    known |= {f"{name}_{part}" for name, one in METRICS.items() if one.kind == "histogram" for part in ("bucket", "sum", "count")}
    named = set(re.findall(r"\bgms_[a-z_]+", sections["Alerts"]))
    assert named
    assert named <= known


def test_environment_table_is_complete_when_variables_change() -> None:
    assert {row[0] for row in _rows(_sections("configuration.md")["Environment variables"])} == {f"`{name}`" for name in config.ENVIRONMENT}


def test_variables_are_declared_when_the_code_or_the_docs_name_them() -> None:
    patterns = ["gms_core/**/*.py", "integrations/**/*.py", "patches/**/*.py", "docs/**/*.md", "README.md"]
    sources = [path for pattern in patterns for path in ROOT.glob(pattern)]
    named = {name: path for path in sources for name in re.findall(r"\bGMS_[A-Z][A-Z_]*[A-Z]\b", path.read_text())}
    assert {name: str(path) for name, path in named.items() if name not in config.ENVIRONMENT.keys() | DEVELOPMENT_VARIABLES | TOLD_VARIABLES} == {}
    assert named.keys() >= config.ENVIRONMENT.keys()


@pytest.mark.parametrize(
    ("heading", "block"),
    [("The block of an engine", GmsConfig), ("The failover block of an engine", FailoverConfig), ("The nodes block of an engine", NodesConfig)],
)
def test_configuration_block_is_complete_when_keys_change(heading: str, block: type[BaseModel]) -> None:
    rows = {row[0].strip("`"): row[2].strip("`") for row in _rows(_sections("configuration.md")[heading])}
    assert rows.keys() == block.model_fields.keys()
    for name, field in block.model_fields.items():
        assert rows[name] == _shown(field.default), name


def _shown(default: object) -> str:
    if default is None or default is PydanticUndefined:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_command_pages_are_complete_when_commands_or_options_change() -> None:
    sections = _sections("cli.md")
    commands = _commands(gms, "gms")
    assert {heading for heading in sections if heading.startswith("gms ")} == set(commands)
    for name, command in commands.items():
        assert _documented_options(sections[name]) == _options(command), name
    assert _documented_options(sections[""]) - {"-h", "--help"} == _options(gms)


def test_every_option_has_a_help_text_when_commands_change() -> None:
    for name, command in _commands(gms, "gms").items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"
            else:
                assert _name(parameter) in command.help, f"{name}: arguments have no help text of their own"


def test_python_names_exist_when_the_api_page_names_them() -> None:
    sections = {heading: text for heading, text in _sections("python-api.md").items() if heading.startswith("gms_core.")}
    assert "gms_core.client" in sections
    for heading, text in sections.items():
        module = importlib.import_module(heading)
        names = [row[0].strip("`") for row in _rows(text)]
        for name in names:
            owner: object = module
            for part in name.split("."):
                assert hasattr(owner, part) or part in getattr(owner, "__annotations__", {}), f"{heading}.{name}"
                owner = getattr(owner, part, None)
        assert set(getattr(module, "__all__", ())) <= set(names), heading


def test_relative_links_lead_somewhere_when_pages_move() -> None:
    for page in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["python-api.md", "hooks.md", "../rolling-updates.md"])
def test_examples_run_when_a_server_is_there(page: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_RUNTIME_DIR", str(server.directory))
    examples = _blocks(REFERENCE / page, "python")
    assert examples
    names: dict[str, Any] = {}  # a later one goes on with what the ones before have
    for example in examples:
        exec(compile(example, page, "exec"), names)


def test_shell_examples_name_commands_and_options_that_exist_when_people_copy_them() -> None:
    commands = _commands(gms, "gms")
    for page in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"]:
        for line in "".join(_blocks(page, "console")).splitlines():
            if not line.startswith("gms "):
                continue
            words = list(itertools.takewhile(lambda word: word != "--", shlex.split(line, comments=True)))
            name = next((name for name in commands if words[: len(name.split())] == name.split()), None)
            assert name is not None, f"{page.name}: {line}"
            assert {word.partition("=")[0] for word in words if word.startswith("-")} <= _options(commands[name]), f"{page.name}: {line}"
