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
    assert caught.value.details["mode"] == """must be 'auto', 'rw' or 'ro' (got "write")"""
    assert caught.value.details["connect_timeout_s"] == "must be more than 0 (got 0)"
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


@pytest.mark.parametrize(("block", "kind"), [("ro", "a string"), (3, "a number"), (0.5, "a number"), (True, "a boolean"), (["mode"], "a list")])
def test_block_is_refused_when_it_is_no_mapping(block: object, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{WHERE} is {kind}, not a block of options"):
        parse_block(block, where=WHERE)


@pytest.mark.parametrize(
    ("block", "key", "sentence"),
    [
        ({"mode": None}, "mode", "must be 'auto', 'rw' or 'ro' (got null)"),
        ({"tag": "a/b"}, "tag", "must be 1 to 64 letters, digits, '_', '.' or '-', and begin with a letter or a digit (got \"a/b\")"),
        ({"tag": 5}, "tag", "must be a string (got 5)"),
        ({"inner": ""}, "inner", 'must not be empty (got "")'),
        ({"identity": ["a"]}, "identity", 'must be a block of strings (got ["a"])'),
        ({"identity": {"a": 1}}, "identity.a", "must be a string (got 1)"),
        ({"socket_path": 1}, "socket_path", "must be a string (got 1)"),
        ({"memory_timeout_s": "soon"}, "memory_timeout_s", 'must be a number (got "soon")'),
        ({"failover": "yes"}, "failover", "must be a block of options"),
        ({"failover": {"autonomous": "perhaps"}}, "failover.autonomous", 'must be true or false (got "perhaps")'),
        ({"failover": {"autonomous": None}}, "failover.autonomous", "must be true or false (got null)"),
        ({"failover": {"alias_bytes": 1.5}}, "failover.alias_bytes", "must be a whole number (got 1.5)"),
        ({"failover": {"drain_timeout_s": -1}}, "failover.drain_timeout_s", "must not be less than 0 (got -1)"),
        ({"failover": {"on_promoted": []}}, "failover.on_promoted", "must name a program (got [])"),
        ({"failover": {"on_promoted": "true"}}, "failover.on_promoted", 'must be a list of strings (got "true")'),
    ],
)
def test_sentence_is_about_what_the_user_wrote_when_a_value_is_wrong(block: object, key: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_block(block, where=WHERE)
    assert caught.value.details == {key: sentence}


@pytest.mark.parametrize("webhook", ["ftp://x/s3cret", ["s3cret"], 5])
def test_webhook_is_not_repeated_when_it_is_wrong(webhook: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_block({"failover": {"webhook": webhook}}, where=WHERE)
    assert "failover.webhook: must be" in caught.value.message
    assert "(got" not in f"{caught.value} {caught.value.details}"
