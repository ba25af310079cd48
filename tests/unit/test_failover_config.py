"""Where an engine's failover block comes from."""

from __future__ import annotations

import pytest

from gms_core.engine_config import parse_block
from gms_core.errors import ConfigurationError
from gms_core.failover.config import failover_config


def block(**options: object) -> object:
    return parse_block(options, where="gms")


def test_engine_does_not_fail_over_when_nobody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GMS_FAILOVER", raising=False)
    assert failover_config(block()) is None
    monkeypatch.setenv("GMS_FAILOVER", " ")
    assert failover_config(block()) is None


def test_own_block_wins_when_there_is_the_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_FAILOVER", '{"lock": "gms:other", "deadline_s": 3}')
    found = failover_config(block(failover={"lock": "gms:mine"}))
    assert found is not None
    assert (found.lock, found.deadline_s) == ("gms:mine", None)
    assert failover_config(block(failover=None)) is None


def test_variable_counts_when_the_block_has_no_such_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_FAILOVER", '{"lock": "flock:/run/lock-1", "on_promoted": ["/bin/true", "x"], "autonomous": false}')
    found = failover_config(block(mode="ro"))
    assert found is not None
    assert (found.lock, found.on_promoted, found.autonomous) == ("flock:/run/lock-1", ("/bin/true", "x"), False)
    monkeypatch.setenv("GMS_FAILOVER", "{}")
    defaults = failover_config(block())
    assert defaults is not None
    assert (defaults.lock, defaults.gate) == ("gms:primary", "port")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("yes", "GMS_FAILOVER is no JSON"),
        ("[]", "GMS_FAILOVER is a list, not a block of options"),
        ("null", "GMS_FAILOVER is null, not a block of options"),
        ('{"lok": "gms:a"}', "GMS_FAILOVER: lok: no such option"),
        ('{"lock": "zk:a"}', "GMS_FAILOVER: lock: must be gms:NAME, flock:/ABSOLUTE/PATH, etcd://... or k8s:..."),
        ('{"lock": "etcd:a"}', "GMS_FAILOVER: lock: must be etcd://HOST:PORT"),
        ('{"lock": "k8s:a?ttl_s=1"}', "GMS_FAILOVER: lock: ttl_s must be 3 to 300 seconds"),
        ('{"deadline_s": NaN}', "GMS_FAILOVER: deadline_s: "),
        ('{"on_promoted": []}', "GMS_FAILOVER: on_promoted: must name a program"),
        ('{"webhook": "ftp://x"}', "GMS_FAILOVER: webhook: must begin with http:// or https://"),
    ],
)
def test_variable_is_named_when_its_value_is_wrong(monkeypatch: pytest.MonkeyPatch, text: str, sentence: str) -> None:
    monkeypatch.setenv("GMS_FAILOVER", text)
    with pytest.raises(ConfigurationError) as caught:
        failover_config(block())
    assert sentence in caught.value.message
    assert caught.value.hint
