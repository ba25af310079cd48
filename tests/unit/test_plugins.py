"""Finding, allowing, calling and surviving plugins."""

from __future__ import annotations

import logging
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gms_core.errors import EngineUnsupported, InvalidArgument, PluginError
from gms_core.plugins.engines import EngineAdapter, EngineSource, find_installed, open_wheel
from gms_core.plugins.findings import Check, Status, Verdict
from gms_core.plugins.loading import BUILT_IN, load, load_built_in

InstallPlugin = Callable[[str, str], Path]

GOOD = """
from gms_core.plugins.findings import Check, Finding, Status
from gms_core.plugins.hookspecs import hookimpl

@hookimpl
def gms_doctor_checks():
    return [Check("rack", lambda settings: [Finding(Status.OK, "fan", "turns")])]
"""
BROKEN_IMPORT = "import a_module_that_nobody_has"
UNKNOWN_HOOK = """
from gms_core.plugins.hookspecs import hookimpl

@hookimpl
def gms_engines(colour): return []
"""
FAILING_HOOK = """
from gms_core.plugins.hookspecs import hookimpl

@hookimpl
def gms_doctor_checks(): raise ZeroDivisionError("no rack")
"""
WRONG_RESULT = """
from gms_core.plugins.hookspecs import hookimpl

@hookimpl
def gms_doctor_checks(): return ["a check"]
"""


@pytest.fixture(autouse=True)
def no_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GMS_PLUGINS", raising=False)
    monkeypatch.delenv("GMS_TRACE_PLUGINS", raising=False)


def _only(name: str, errors: list[PluginError]) -> PluginError:
    found = [error for error in errors if f"plugin {name!r}" in error.message]
    assert len(found) == 1
    return found[0]


def test_built_ins_are_plugins_when_nothing_is_installed() -> None:
    plugins = load_built_in()
    assert set(plugins.names()) == set(BUILT_IN)
    assert "runtime directory" in [check.name for check in plugins.collect("gms_doctor_checks", Check)]


def test_hook_of_a_plugin_is_called_when_it_is_installed(install_plugin: InstallPlugin) -> None:
    install_plugin("rack", GOOD)
    plugins = load()
    assert "rack" in plugins.names()
    assert "rack" in [check.name for check in plugins.collect("gms_doctor_checks", Check)]


@pytest.mark.parametrize(("allowed", "loaded"), [("", False), ("other_plugin_name", False), ("rack", True)])
def test_allow_list_decides_when_it_is_set(install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch, allowed: str, loaded: bool) -> None:
    install_plugin("rack", GOOD)
    monkeypatch.setenv("GMS_PLUGINS", allowed)
    assert ("rack" in load().names()) is loaded


def test_plugin_is_reported_when_the_allow_list_names_it_and_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "nowhere")
    assert "not installed" in _only("nowhere", load().broken).message


@pytest.mark.parametrize(
    ("source", "sentence"),
    [(BROKEN_IMPORT, "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"), (UNKNOWN_HOOK, "cannot be loaded")],
)
def test_plugin_is_named_and_left_out_when_it_cannot_be_loaded(install_plugin: InstallPlugin, source: str, sentence: str) -> None:
    install_plugin("wreck", source)
    plugins = load()
    assert "wreck" not in plugins.names()
    error = _only("wreck", plugins.broken)
    assert sentence in error.message
    assert error.details == {"plugin": "wreck"}
    assert "runtime directory" in [check.name for check in plugins.collect("gms_doctor_checks", Check)]


@pytest.mark.parametrize(("source", "sentence"), [(FAILING_HOOK, "ZeroDivisionError: no rack"), (WRONG_RESULT, "did not return a list of Check")])
def test_other_plugins_are_heard_when_a_hook_of_one_is_wrong(install_plugin: InstallPlugin, source: str, sentence: str) -> None:
    install_plugin("wreck", source)
    plugins = load()
    assert "runtime directory" in [check.name for check in plugins.collect("gms_doctor_checks", Check)]
    assert sentence in _only("wreck", plugins.broken).message


def test_hook_calls_are_logged_when_tracing_is_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GMS_TRACE_PLUGINS", "1")
    with caplog.at_level(logging.INFO, "gms_core.plugins"):
        load_built_in().collect("gms_doctor_checks", Check)
    assert "hook gms_doctor_checks called" in caplog.text
    assert "hook gms_doctor_checks returned" in caplog.text


def _has_loader(source: EngineSource) -> Verdict:
    found = source.text("toy_engine.loader")
    return Verdict("toy_engine.loader:load", Status.OK if found and "def load" in found else Status.FAIL, f"{found!r}")


TOY = EngineAdapter("toy", "toy_engine", ("toy-engine-cpu", "toy-engine"), ">=1,<2", (_has_loader,))


def _toy_wheel(path: Path, version: str, name: str = "toy-engine") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_engine/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("toy_engine/loader/__init__.py", "def load(): ...")
        archive.writestr(f"toy_engine-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return path


@pytest.mark.parametrize(
    ("version", "status"), [("1.4", Status.OK), ("1.5rc1", Status.OK), ("1.4+cpu", Status.OK), ("2.0", Status.FAIL), ("dev", Status.FAIL)]
)
def test_version_has_a_verdict_when_a_wheel_is_checked(tmp_path: Path, version: str, status: Status) -> None:
    with open_wheel(TOY, _toy_wheel(tmp_path / "toy.whl", version)) as source:
        verdicts = TOY.check(source)
        assert source.text("toy_engine.absent") is None
        assert source.text("toy_engine") == "raise RuntimeError('imported')"
    assert [verdict.status for verdict in verdicts] == [status, Status.OK]
    assert (status is Status.OK) == (not verdicts[0].fix)


def test_wheel_is_refused_when_it_is_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(EngineUnsupported, match="wheel of 'numpy', not of toy"), open_wheel(TOY, _toy_wheel(tmp_path / "n.whl", "1", "numpy")):
        pass


def test_wheel_is_refused_when_it_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("text")
    with pytest.raises(InvalidArgument, match="cannot be read as a wheel"), open_wheel(TOY, tmp_path / "text.whl"):
        pass


def test_installed_engine_is_read_and_not_imported_when_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(_toy_wheel(tmp_path / "toy.whl", "1.7")) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = find_installed(TOY)
    assert source is not None
    assert (source.version, source.where) == ("1.7", str(tmp_path / "site/toy_engine"))
    assert [verdict.status for verdict in TOY.check(source)] == [Status.OK, Status.OK]
    assert source.text("toy_engine") == "raise RuntimeError('imported')"
    assert source.text("toy_engine.absent") is None
    assert "toy_engine" not in sys.modules


def test_engine_is_absent_when_it_is_not_installed() -> None:
    assert find_installed(TOY) is None
