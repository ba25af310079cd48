"""What SGLang's KV cache says to the plan of the KV memory, and what makes engines stand in for one another."""

from __future__ import annotations

import pytest

from gms_core.engine_config import FailoverConfig, GmsConfig
from gms_core.errors import ConfigurationError, EngineUnsupported
from gms_core.layout import Identity
from gms_sglang.kv_identity import kv_identity
from gms_sglang.kv_plan import Values, budget_of, check_cap, layout_of

POOL = {"pool": "MHATokenToKVPool", "page_size": 16, "dtype": "bfloat16"}
KEYS = Values((4112, 2, 64), (128, 64, 1), "bfloat16", 4112 * 2 * 64 * 2)


def test_layout_is_the_same_when_everything_is() -> None:
    again = Values(tuple(KEYS.shape), tuple(KEYS.strides), "bfloat16", KEYS.size)
    assert layout_of(POOL, [KEYS, KEYS]) == layout_of(dict(reversed(POOL.items())), [again, again])


@pytest.mark.parametrize(
    ("pool", "tensors"),
    [
        ({**POOL, "page_size": 1}, [KEYS, KEYS]),
        ({**POOL, "pool": "MLATokenToKVPool"}, [KEYS, KEYS]),
        (POOL, [KEYS]),
        (POOL, [KEYS, KEYS._replace(shape=(4112, 4, 32))]),
        (POOL, [KEYS, KEYS._replace(strides=(256, 64, 1))]),
        (POOL, [KEYS, KEYS._replace(dtype="float16")]),
    ],
)
def test_layout_differs_when_anything_does(pool: dict[str, object], tensors: list[Values]) -> None:
    assert layout_of(pool, tensors) != layout_of(POOL, [KEYS, KEYS])


def test_budget_leaves_the_page_for_padding_out() -> None:
    assert budget_of([KEYS, KEYS], tokens=4096, page_size=16) == 4096 * 2 * 2 * 64 * 2


@pytest.mark.parametrize(("tokens", "page_size"), [(4097, 16), (0, 16), (4096, 15)])
def test_budget_is_refused_when_tokens_have_no_whole_number_of_bytes(tokens: int, page_size: int) -> None:
    with pytest.raises(EngineUnsupported, match="no whole number of bytes"):
        budget_of([KEYS], tokens, page_size)


@pytest.mark.parametrize("cap", [None, 4096, 4097, 10**6])
def test_cap_is_accepted_when_the_plan_fits(cap: int | None) -> None:
    check_cap(cap, planned=4096, page_size=16, pool="kv_cache")


@pytest.mark.parametrize("cap", [4095, 16])
def test_cap_is_refused_when_it_is_less_than_was_planned(cap: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"--max-total-tokens {cap} is less than pool 'kv_cache' was planned with: 4096"):
        check_cap(cap, planned=4096, page_size=16, pool="kv_cache")


def test_pages_count_whole_when_a_cap_ends_inside_of_one() -> None:
    check_cap(4100, planned=4096, page_size=16, pool="kv_cache")
    with pytest.raises(ConfigurationError):
        check_cap(4095 + 16, planned=4112, page_size=16, pool="kv_cache")


def test_kv_memory_is_for_engines_of_one_lock_and_page_size_whatever_they_read() -> None:
    weights = Identity({"model": "m", "content": "abc", "load": "dummy"})
    options, failover = GmsConfig(), FailoverConfig()
    ours = kv_identity(weights, 16, options, failover)
    assert ours == kv_identity(Identity({"model": "m"}), 16, options, failover)
    assert ours != kv_identity(weights, 1, options, failover)
    assert ours != kv_identity(Identity({"model": "n"}), 16, options, failover)
    assert ours != kv_identity(weights, 16, options, FailoverConfig(lock="gms:other"))
    assert ours != kv_identity(weights, 16, GmsConfig(tag="other"), failover)
