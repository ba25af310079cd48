"""Steps that ranks take together: with one that cannot, none of them has taken it.

A rank that computes waits for the others. So where one may compute and another may not, the next request would hang both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gms_sglang.refusals import told

Outcome = dict[str, Any]
"""What became of a step on one rank: ``answer``, or ``error`` as of `gms_sglang.refusals.told`."""


def together(step: Callable[[], Any], gather: Callable[[Outcome], list[Outcome]], take_back: Callable[[], None]) -> list[Outcome]:
    """Take a step on every rank.

    Args:
        step: This rank's part.
        gather: Has what became of it on all ranks, in their order, once each has tried.
        take_back: Undoes this rank's part, done or half done, where a rank has failed.

    Returns:
        What became of it on each rank.
    """
    outcomes = gather(_attempted(step))
    if any("error" in one for one in outcomes):
        take_back()
    return outcomes


def _attempted(step: Callable[[], Any]) -> Outcome:
    """Try a step on this rank. What it raises is told to the others, who would wait for this rank for ever."""
    try:
        return {"answer": step()}
    except Exception as error:  # noqa: BLE001 - told to whoever asks
        return {"error": told(error)}
