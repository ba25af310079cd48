"""The plan of KV memory, which the first engine makes and the others adopt."""

from __future__ import annotations

import json

import msgspec
import pytest

from gms_core.errors import IdentityMismatch, ProtocolError
from gms_core.kv.plan import KvPlan

PLAN = KvPlan.new((12345, 12344), 10, (100, 200), "a layout", 3)


def test_plan_is_the_same_when_it_was_encoded_and_decoded() -> None:
    assert KvPlan.decode(PLAN.encode()) == PLAN
    assert json.loads(PLAN.encode())["budgets"] == [12345, 12344]


def test_marks_differ_when_plans_are_made() -> None:
    assert KvPlan.new((1,), 1, (), "").mark != KvPlan.new((1,), 1, (), "").mark


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"budgets": "many"}'])
def test_plan_is_refused_when_it_is_none(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="plan"):
        KvPlan.decode(data)


def test_engine_adopts_a_plan_when_it_has_other_wishes() -> None:
    PLAN.check_adopted(KvPlan.new((1, 2), 10, (100, 200), "a layout"), "kv")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_blocks": 9}, {"num_blocks"}),
        ({"buffers": (100, 100)}, {"buffers"}),
        ({"layout": "another"}, {"layout"}),
        ({"num_blocks": 11, "buffers": (300,), "layout": "another"}, {"num_blocks", "buffers", "layout"}),
    ],
)
def test_differences_are_named_when_an_engine_has_become_something_else(fields: dict[str, object], named: set[str]) -> None:
    with pytest.raises(IdentityMismatch, match="pool 'kv'") as caught:
        PLAN.check_adopted(msgspec.structs.replace(PLAN, **fields), "kv")
    assert set(caught.value.details) == named
