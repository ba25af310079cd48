"""Settings from the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gms_core.config import ENVIRONMENT, child_environment, settings
from gms_core.errors import ConfigurationError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ENVIRONMENT, "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)


def test_defaults_hold_when_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    found = settings()
    assert found.runtime_dir == Path("/tmp/gms-1234")
    assert found.cache_dir == Path.home() / ".cache/gms"
    assert found.plugins is None
    assert not found.trace_plugins
    assert not found.allow_untested_engine


def test_runtime_dir_is_below_run_when_the_user_is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert settings().runtime_dir == Path("/run/gms")


def test_own_variable_wins_when_the_desktop_variable_is_set_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/x/cache")
    assert settings().runtime_dir == Path("/run/user/7/gms")
    assert settings().cache_dir == Path("/home/x/cache/gms")
    monkeypatch.setenv("GMS_RUNTIME_DIR", "/srv/gms")
    monkeypatch.setenv("GMS_CACHE_DIR", "/srv/cache")
    assert settings().runtime_dir == Path("/srv/gms")
    assert settings().cache_dir == Path("/srv/cache")


@pytest.mark.parametrize("name", ["GMS_RUNTIME_DIR", "GMS_CACHE_DIR"])
def test_directory_is_refused_when_it_is_relative(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "run/gms")
    with pytest.raises(ConfigurationError, match=f"{name}='run/gms' is not an absolute path"):
        settings()


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("Yes", True), ("on", True), ("0", False), ("false", False), ("", False)])
def test_switch_is_read_when_it_is_written_in_any_usual_way(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("GMS_ALLOW_UNTESTED_ENGINE", value)
    assert settings().allow_untested_engine is expected


@pytest.mark.parametrize("name", ["GMS_TRACE_PLUGINS", "GMS_ALLOW_UNTESTED_ENGINE"])
def test_switch_is_refused_when_it_is_neither_on_nor_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ConfigurationError, match=f"{name}='maybe' is neither on nor off"):
        settings()


@pytest.mark.parametrize(("value", "expected"), [("vllm", ("vllm",)), (" a , b,", ("a", "b")), ("", ())])
def test_plugins_are_a_list_when_the_variable_is_set(monkeypatch: pytest.MonkeyPatch, value: str, expected: tuple[str, ...]) -> None:
    monkeypatch.setenv("GMS_PLUGINS", value)
    assert settings().plugins == expected


def test_child_environment_has_the_changes_when_some_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_PLUGINS", "a")
    changed = child_environment(GMS_PLUGINS="b", OTHER="c")
    assert (changed["GMS_PLUGINS"], changed["OTHER"], os.environ["GMS_PLUGINS"]) == ("b", "c", "a")
