"""For how long an engine may count on its lock: whatever the answers' times are, it has ended before the store lets anybody else have the lock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gms_core.failover.elector.validity import MARGIN, RENEWALS, Validity, answer_s, renewal_pause_s

SECONDS = st.floats(0, 1000, allow_nan=False)


@given(ttl_s=st.floats(3, 300), taken=SECONDS, renewals=st.lists(st.tuples(SECONDS, st.floats(0, 30))))
def test_engine_ends_before_the_store_lets_others_have_the_lock_whatever_the_answers_take(ttl_s, taken, renewals):
    """The store counts from when it was asked, or later: never earlier."""
    validity, runs_out_in_store = Validity(ttl_s, taken), taken + ttl_s
    for asked_at, way_s in renewals:
        validity.renewed(asked_at)
        runs_out_in_store = max(runs_out_in_store, asked_at + way_s + ttl_s)
    assert validity.runs_out_at <= runs_out_in_store
    assert validity.ends_at <= runs_out_in_store - 0.99 * MARGIN * ttl_s
    assert validity.has_ended(runs_out_in_store)
    assert not validity.has_ended(taken)


def test_answer_that_comes_late_does_not_take_time_away():
    validity = Validity(10, 100)
    validity.renewed(105)
    validity.renewed(103)
    assert validity.runs_out_at == 115


@given(ttl_s=st.floats(3, 300))
def test_several_renewals_fit_before_the_end(ttl_s):
    each_s = renewal_pause_s(ttl_s) + answer_s(ttl_s)
    assert each_s * (RENEWALS - 1) <= (1 - MARGIN) * ttl_s * 1.0001
