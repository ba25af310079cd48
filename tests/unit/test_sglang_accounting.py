"""What an SGLang engine counts as weights that were there before it, without an SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import gms_sglang.accounting as accounting
from gms_core.amounts import GIB
from gms_core.weights.holdings import Holding


def _holding(external: int, neighbours: int = 0) -> Holding:
    nobody: Any = None
    return Holding(nobody, nobody, neighbours=neighbours, external_bytes=external)


@pytest.mark.parametrize(
    ("external", "neighbours", "counted"),
    [
        (8 * GIB, 0, 8 * GIB),  # published before
        (8 * GIB, 8 * GIB, 0),  # all of it came while this engine waited for it, after the first measurement
        (8 * GIB, 3 * GIB, 5 * GIB),
        (8 * GIB, 20 * GIB, 0),  # others took even more
        (8 * GIB, -2 * GIB, 8 * GIB),  # others gave some back
        (0, 5 * GIB, 0),  # it publishes itself
    ],
)
def test_weights_are_counted_when_they_were_there_before_the_measurement(external: int, neighbours: int, counted: int) -> None:
    assert accounting.preloaded_bytes(_holding(external, neighbours)) == counted


def test_older_engine_counts_them_once_when_it_has_a_draft_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "all_kept", lambda: (_holding(8 * GIB), _holding(GIB)))
    (hook,) = accounting.HOOKS
    target, draft = (SimpleNamespace(is_draft_worker=is_draft, pre_model_load_memory=100.0) for is_draft in (False, True))
    for runner in (target, draft):
        assert hook.function(runner, memory_pool_config=None) is None
    assert (target.pre_model_load_memory, draft.pre_model_load_memory) == (109.0, 100.0)
