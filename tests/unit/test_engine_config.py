"""The configuration block of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_core.engine_config import GmsConfig, parse_block
from gms_core.errors import ConfigurationError

WHERE = "--model-loader-extra-config: gms"


@pytest.mark.parametrize("block", [None, {}])
def test_defaults_hold_when_the_block_is_empty(block: object) -> None:
    config = parse_block(block, where=WHERE)
    assert config == GmsConfig()
    assert (config.mode, config.tag, config.inner, config.socket_path) == ("auto", "weights", "auto", None)
    assert (config.acquire_timeout_s, config.connect_timeout_s, config.memory_timeout_s) == (1800, 10, 60)


def test_values_are_taken_when_they_are_right() -> None:
    block = {"mode": "ro", "tag": "draft.v2", "socket_path": "/run/gms/host.sock", "identity": {"fork": "x"}, "acquire_timeout_s": 5}
    config = parse_block(block, where=WHERE)
    assert (config.mode, config.tag, config.socket_path, config.identity) == ("ro", "draft.v2", Path("/run/gms/host.sock"), {"fork": "x"})
    assert config.acquire_timeout_s == 5.0


def test_block_is_returned_when_it_is_parsed_already() -> None:
    config = GmsConfig(mode="rw")
    assert parse_block(config, where=WHERE) is config


def test_every_wrong_key_is_named_when_several_are_wrong() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_block({"mdoe": "ro", "mode": "write", "connect_timeout_s": 0}, where=WHERE)
    assert caught.value.message.startswith(f"{WHERE}: ")
    assert set(caught.value.details) == {"mdoe", "mode", "connect_timeout_s"}
    assert caught.value.details["mdoe"] == "no such option"
    assert "'write'" in caught.value.details["mode"]
    assert "socket_path" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tag", ""),
        ("tag", "-weights"),
        ("tag", "a" * 65),
        ("tag", "weights\n"),
        ("tag", "a/b"),
        ("inner", ""),
        ("socket_path", "host.sock"),
        ("identity", {"a": 1}),
        ("acquire_timeout_s", float("inf")),
        ("acquire_timeout_s", float("nan")),
        ("memory_timeout_s", -1),
        ("connect_timeout_s", "soon"),
        ("mode", None),
    ],
)
def test_value_is_refused_when_it_cannot_be_right(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_block({key: value}, where=WHERE)
    assert any(name.split(".")[0] == key for name in caught.value.details)


@pytest.mark.parametrize("block", ["ro", 3, ["mode"]])
def test_block_is_refused_when_it_is_no_mapping(block: object) -> None:
    with pytest.raises(ConfigurationError, match="not a block of options"):
        parse_block(block, where=WHERE)
