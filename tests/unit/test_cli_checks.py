"""``gms doctor`` and ``gms patches check``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from gms_core.cli import gms
from gms_core.cli.exit_codes import ExitCode

InstallPlugin = Callable[[str, str], Path]

TOY = """
from gms_core.plugins.engines import EngineAdapter
from gms_core.plugins.findings import Status, Verdict
from gms_core.plugins.hookspecs import hookimpl

def loader(source):
    found = "def load(model)" in (source.text("toy_engine.loader") or "")
    return Verdict("toy_engine.loader:load", Status.OK if found else Status.FAIL, "seen" if found else "not there", "" if found else "Update.")

@hookimpl
def gms_engines():
    return [EngineAdapter("toy", "toy_engine", ("toy-engine",), ">=1,<2", (loader,))]
"""
CHECK = """
from gms_core.errors import DriverError
from gms_core.plugins.findings import Check, Finding, Status
from gms_core.plugins.hookspecs import hookimpl

def {body}

@hookimpl
def gms_doctor_checks():
    return [Check("rack", run)]
"""


@pytest.fixture(autouse=True)
def plugins_of_the_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "toy,rack,wreck")


def _toy_wheel(folder: Path, version: str = "1.2", source: str = "def load(model): ...") -> Path:
    path = folder / f"toy_engine-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_engine/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("toy_engine/loader.py", source)
        archive.writestr(f"toy_engine-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: toy-engine\nVersion: {version}\n")
    return path


def _doctor(directory: Path) -> tuple[int, dict[str, list[dict[str, str]]]]:
    result = CliRunner().invoke(gms, ["doctor", "--runtime-dir", str(directory), "-o", "json"])
    document = json.loads(result.stdout)
    assert document["schema"] == "gms-doctor/1"
    found: dict[str, list[dict[str, str]]] = {}
    for finding in document["findings"]:
        found.setdefault(finding.pop("check"), []).append(finding)
    return result.exit_code, found


def _install(check: str, install_plugin: InstallPlugin) -> None:
    install_plugin("rack", CHECK.replace("{body}", check))


def test_doctor_tries_host_memory_and_seals_when_it_runs(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "")
    code, found = _doctor(runtime_dir)
    assert code == ExitCode.OK
    assert [finding["status"] for finding in found["host device"]] == ["ok", "ok"]
    assert found["runtime directory"] == [
        {"status": "ok", "what": str(runtime_dir), "evidence": "a directory of this user, closed to others", "fix": ""}
    ]
    assert {"environment", "limits", "servers", "plugins"} <= found.keys()


def test_doctor_shows_evidence_and_fix_when_people_read_it(runtime_dir: Path, install_plugin: InstallPlugin) -> None:
    _install('run(settings): return [Finding(Status.FAIL, "fan", "stands still", "Turn it on.")]', install_plugin)
    result = CliRunner().invoke(gms, ["doctor", "--runtime-dir", str(runtime_dir)])
    assert result.exit_code == ExitCode.FINDINGS
    assert "rack\n  FAIL  fan: stands still\n        fix: Turn it on.\n" in result.stdout


@pytest.mark.parametrize(
    ("body", "what", "evidence"),
    [
        ('run(settings): raise DriverError("no rack", hint="Buy one.")', "driver", "no rack"),
        ("run(settings): return [1 / 0]", "the check itself", "ZeroDivisionError: division by zero"),
    ],
)
def test_doctor_goes_on_when_a_check_raises(runtime_dir: Path, install_plugin: InstallPlugin, body: str, what: str, evidence: str) -> None:
    _install(body, install_plugin)
    code, found = _doctor(runtime_dir)
    assert code == ExitCode.FINDINGS
    assert [(finding["status"], finding["what"], finding["evidence"]) for finding in found["rack"]] == [("fail", what, evidence)]
    assert "plugins" in found


def test_doctor_names_the_plugin_when_it_is_broken(runtime_dir: Path, install_plugin: InstallPlugin) -> None:
    install_plugin("wreck", "import nothing_of_that_name")
    code, found = _doctor(runtime_dir)
    assert code == ExitCode.FINDINGS
    assert [finding for finding in found["plugins"] if finding["status"] == "fail" and "plugin 'wreck'" in finding["evidence"]]
    assert found["host device"][0]["status"] == "ok"


def test_doctor_fails_when_others_can_enter_the_runtime_directory(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)
    code, found = _doctor(runtime_dir)
    assert code == ExitCode.FINDINGS
    (finding,) = found["runtime directory"]
    assert finding["status"] == "fail"
    assert finding["fix"]


def test_doctor_leaves_no_directory_behind_when_there_is_none(runtime_dir: Path) -> None:
    _, found = _doctor(runtime_dir / "gms")
    assert found["runtime directory"][0]["status"] == "ok"
    assert not (runtime_dir / "gms").exists()


def test_doctor_fails_when_a_socket_is_dead(runtime_dir: Path) -> None:
    (runtime_dir / "host.sock").write_text("")
    code, found = _doctor(runtime_dir)
    assert code == ExitCode.FINDINGS
    assert [finding["what"] for finding in found["servers"] if finding["status"] == "fail"] == ["host.sock"]


def test_doctor_warns_when_the_runtime_directory_cannot_be_read(runtime_dir: Path) -> None:
    (runtime_dir / "file").touch()
    code, found = _doctor(runtime_dir / "file")
    assert code == ExitCode.FINDINGS
    (finding,) = found["servers"]
    assert (finding["status"], finding["evidence"]) == ("warn", f"the runtime directory {runtime_dir}/file cannot be read: Not a directory")
    assert finding["fix"]


@pytest.mark.parametrize(("version", "code", "status"), [("1.9", ExitCode.OK, "ok"), ("2.0", ExitCode.FINDINGS, "fail")])
def test_doctor_has_verdicts_when_an_engine_is_installed(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install_plugin: InstallPlugin, version: str, code: ExitCode, status: str
) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "toy")
    site = install_plugin("toy", TOY)
    with zipfile.ZipFile(_toy_wheel(tmp_path, version)) as archive:
        archive.extractall(site)
    exit_code, found = _doctor(runtime_dir)
    assert exit_code == code
    assert found["engines"][0]["status"] == status


def test_patches_are_checked_when_a_wheel_is_given(tmp_path: Path, install_plugin: InstallPlugin) -> None:
    install_plugin("toy", TOY)
    wheel = _toy_wheel(tmp_path)
    result = CliRunner().invoke(gms, ["patches", "check", "--wheel", str(wheel), "-o", "json"])
    assert result.exit_code == ExitCode.OK, result.output
    document = json.loads(result.stdout)
    (engine,) = document["engines"]
    assert (document["schema"], engine["engine"], engine["version"], engine["where"]) == ("gms-patches/1", "toy", "1.2", str(wheel))
    assert engine["verdicts"][1] == {"target": "toy_engine.loader:load", "status": "ok", "evidence": "seen", "fix": ""}


def test_patches_check_fails_when_the_engine_has_changed(tmp_path: Path, install_plugin: InstallPlugin) -> None:
    install_plugin("toy", TOY)
    result = CliRunner().invoke(gms, ["patches", "check", "--engine", "toy", "--wheel", str(_toy_wheel(tmp_path, source="def load(path): ..."))])
    assert result.exit_code == ExitCode.FINDINGS
    assert "  fail  toy_engine.loader:load: not there\n        fix: Update.\n" in result.stdout
    assert "1 ok, 0 warn, 1 fail" in result.stdout
    assert "in the tested range" not in result.stdout


def test_patches_check_shows_good_verdicts_when_it_is_told_to(tmp_path: Path, install_plugin: InstallPlugin) -> None:
    install_plugin("toy", TOY)
    result = CliRunner().invoke(gms, ["patches", "check", "-v", "--wheel", str(_toy_wheel(tmp_path))])
    assert "  ok    toy 1.2: in the tested range >=1,<2\n  ok    toy_engine.loader:load: seen\n" in result.stdout


def test_patches_check_says_so_when_the_engine_is_not_installed(install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "toy")
    install_plugin("toy", TOY)
    result = CliRunner().invoke(gms, ["patches", "check", "--engine", "toy"])
    assert result.exit_code == ExitCode.UNSUPPORTED
    assert result.stderr.startswith("gms: toy is not installed here\nhint: ")


def test_patches_check_names_the_engines_when_no_adapter_has_the_name(install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "toy")
    install_plugin("toy", TOY)
    result = CliRunner().invoke(gms, ["patches", "check", "--engine", "tyo"])
    assert result.exit_code == ExitCode.UNSUPPORTED
    assert "Engines with an adapter: toy." in result.stderr


def test_patches_check_names_the_broken_plugin_when_it_may_have_had_the_adapter(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "wreck")
    install_plugin("wreck", "1 / 0")
    result = CliRunner().invoke(gms, ["patches", "check", "--engine", "toy"])
    assert result.exit_code == ExitCode.FAILURE
    assert result.stderr.startswith("gms: plugin 'wreck': ")


@pytest.mark.parametrize(("name", "code"), [("numpy", ExitCode.UNSUPPORTED), ("", ExitCode.USAGE)])
def test_patches_check_refuses_the_file_when_it_is_no_wheel_of_the_engine(
    tmp_path: Path, install_plugin: InstallPlugin, name: str, code: ExitCode
) -> None:
    install_plugin("toy", TOY)
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        if name:
            archive.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    assert CliRunner().invoke(gms, ["patches", "check", "--wheel", str(wheel)]).exit_code == code
