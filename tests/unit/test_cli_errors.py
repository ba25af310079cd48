"""How errors, sizes and options of the ``gms`` command behave."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gms_core import __version__
from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode, for_type
from gms_core.cli.group import GmsGroup
from gms_core.cli.options import format_size, output_option, parse_size
from gms_core.config import child_environment
from gms_core.errors import AllocationTooLarge, GmsError, IdentityMismatch, OutOfMemory, VersionMismatch, error_types

InstallPlugin = Callable[[str, str], Path]


def _failing(error: BaseException) -> click.Group:
    @click.group(cls=GmsGroup)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None: ...

    @group.command()
    @output_option("table", "json")
    def fail(output: str) -> None:
        raise error

    return group


def test_version_is_shown_when_asked_for() -> None:
    result = CliRunner().invoke(gms, ["--version"])
    assert (result.exit_code, result.output) == (0, f"gms, version {__version__}\n")


def test_error_is_one_line_and_a_hint_when_a_command_fails() -> None:
    error = IdentityMismatch("other weights are published", hint="Use another tag.", details={"model": "'a' != 'b'"})
    result = CliRunner().invoke(_failing(error), ["fail"])
    assert result.stdout == ""
    assert result.stderr == "gms: other weights are published\nhint: Use another tag.\n"
    assert result.exit_code == ExitCode.IDENTITY


def test_error_has_no_hint_line_when_there_is_no_hint() -> None:
    assert CliRunner().invoke(_failing(GmsError("it broke")), ["fail"]).stderr == "gms: it broke\n"


def test_error_is_json_when_the_output_is() -> None:
    error = OutOfMemory("no room", hint="Wait.", details={"bytes": "5"})
    result = CliRunner().invoke(_failing(error), ["fail", "-o", "json"])
    assert result.stdout == ""
    told = {"code": "out_of_memory", "message": "no room", "hint": "Wait.", "retryable": True, "details": {"bytes": "5"}, "exit_code": 10}
    assert json.loads(result.stderr) == {"error": told}


def test_traceback_is_shown_when_debugging() -> None:
    result = CliRunner().invoke(_failing(GmsError("it broke")), ["--debug", "fail"])
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("gms: it broke\n")


def test_exit_code_says_so_when_the_keyboard_interrupts() -> None:
    assert CliRunner().invoke(_failing(KeyboardInterrupt()), ["fail"]).exit_code == ExitCode.INTERRUPTED


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["status", "--help"], ["patches", "check", "--engine", "vllm"]])
def test_error_is_one_line_when_the_disk_of_the_output_is_full(arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "gms_core.cli", *arguments]
    with Path("/dev/full").open("wb") as full:
        environment = child_environment(PYTHONUNBUFFERED=unbuffered)
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (ExitCode.FAILURE, "gms: the output cannot be written: No space left on device\n")


def test_error_is_not_said_to_be_of_the_output_when_it_is_not() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert CliRunner().invoke(_failing(error), ["fail"]).exception is error


def test_every_error_has_an_exit_code_when_it_reaches_the_command_line() -> None:
    assert {for_type(kind) for kind in error_types().values()} <= set(ExitCode) - {ExitCode.OK, ExitCode.FINDINGS, ExitCode.INTERRUPTED}
    assert for_type(AllocationTooLarge) is ExitCode.NO_MEMORY
    assert for_type(VersionMismatch) is ExitCode.UNSUPPORTED


def test_usage_error_names_the_option_when_it_is_unknown() -> None:
    result = CliRunner().invoke(gms, ["status", "--colour"])
    assert result.exit_code == ExitCode.USAGE
    assert "--colour" in result.stderr


def test_wrong_variable_is_named_when_a_command_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_RUNTIME_DIR", "here")
    result = CliRunner().invoke(gms, ["status"])
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith("gms: GMS_RUNTIME_DIR='here' is not an absolute path\nhint: ")


@pytest.mark.parametrize("command", [["status"], ["serve", "--device", "host"], ["failover", "status"]])
def test_refusal_is_the_same_when_the_runtime_directory_is_an_option_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    (tmp_path / "file").touch(0o600)
    option = CliRunner().invoke(gms, [*command, "--runtime-dir", str(tmp_path / "file")])
    monkeypatch.setenv("GMS_RUNTIME_DIR", str(tmp_path / "file"))
    variable = CliRunner().invoke(gms, command)
    assert (option.exit_code, option.stderr) == (variable.exit_code, variable.stderr)
    assert option.exit_code == ExitCode.PERMISSION
    assert option.stderr.startswith(f"gms: the runtime directory {tmp_path}/file ")


def test_wrong_variable_is_named_when_the_names_of_all_commands_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_TRACE_PLUGINS", "perhaps")
    result = CliRunner().invoke(_failing(GmsError("unused")), ["--help"])
    assert result.exit_code == ExitCode.USAGE
    assert "GMS_TRACE_PLUGINS" in result.stderr


@pytest.mark.parametrize("command", [["status"], ["status", "--runtime-dir", "/nowhere"], ["patches", "check"], ["bench", "attach"]])
@pytest.mark.parametrize(("name", "value"), [("GMS_RUNTIME_DIR", "here"), ("GMS_TRACE_PLUGINS", "perhaps")])
def test_wrong_variable_is_told_as_json_when_the_output_is(monkeypatch: pytest.MonkeyPatch, name: str, value: str, command: list[str]) -> None:
    monkeypatch.setenv(name, value)
    result = CliRunner().invoke(gms, [*command, "-o", "json"])
    assert result.exit_code == ExitCode.USAGE
    assert name in json.loads(result.stderr)["error"]["message"]


def test_help_of_a_command_is_shown_when_a_variable_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_TRACE_PLUGINS", "perhaps")
    result = CliRunner().invoke(gms, ["status", "--help"])
    assert (result.exit_code, "--watch" in result.stdout) == (0, True)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("512MiB", 2**29),
        ("1.5KiB", 1536),
        ("2G", 2 * 10**9),
        ("3Ti", 3 * 2**40),
        ("7B", 7),
    ],
)
def test_size_is_understood_when_it_has_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1.5", "8 GiBs", "1e3", "0x10", "nan"])
def test_size_is_refused_when_it_is_no_positive_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=r"no size|whole number"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**40, "1 TiB"), (100 * 2**30, "100 GiB")]
)
def test_size_is_short_when_it_is_shown(size: int, text: str) -> None:
    assert format_size(size) == text


COMMAND = """
import click
from gms_core.plugins.hookspecs import hookimpl

@hookimpl
def gms_commands(group):
    @group.command()
    def greet():
        "Say hello."
        click.echo("hello from a plugin")
"""


def _gms(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    environment = child_environment(PYTHONPATH=str(site))
    environment.pop("GMS_PLUGINS", None)
    return subprocess.run([sys.executable, "-m", "gms_core.cli", *arguments], capture_output=True, text=True, env=environment, check=False)


def test_command_of_a_plugin_runs_when_it_is_installed(install_plugin: InstallPlugin) -> None:
    site = install_plugin("greeter", COMMAND)
    assert _gms("greet", site=site).stdout == "hello from a plugin\n"
    listing = _gms("--help", site=site).stdout
    assert "greet" in listing
    assert "serve" in listing


def test_built_in_commands_work_when_a_plugin_is_broken(install_plugin: InstallPlugin, tmp_path: Path) -> None:
    site = install_plugin("wreck", "1 / 0")
    quiet = _gms("status", "--runtime-dir", str(tmp_path), site=site)
    assert quiet.returncode == ExitCode.NO_SERVER
    assert "wreck" not in quiet.stderr, "a built-in command needs no third-party plugin"
    listing = _gms("--help", site=site)
    assert listing.returncode == 0
    assert "gms: plugin 'wreck': wreck_plugin cannot be loaded: ZeroDivisionError" in listing.stderr


def test_unknown_command_is_a_usage_error_when_no_plugin_has_it() -> None:
    result = CliRunner().invoke(gms, ["fly"])
    assert result.exit_code == ExitCode.USAGE
    assert "No such command 'fly'" in result.stderr
