"""Real engines that are killed in every way, one after the other, while requests flow: one of them serves, rightly, and the dead leave nothing.

What is done, and what is looked at, is in `tests/chaos`; `make chaos` does more of the same.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos.run import Run
from chaos.warden import Warden
from failover_story import Story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2700)]

SEED = 3
NICE = 10
"""The time until somebody answers is told, but not judged here."""
FIRST = "kill writer"
CASES = (
    "kill rank 0",
    "stop api-server 0",
    "stop engine-core",
    "stop rank 0",
    "kill shadow",
    "kill starting",
    "kill promoting",
    "kill server",
    "kill keeper",
)
"""Each other part of a primary is killed in `test_failover_gate.py`."""
LAST = ("kill server", "kill group", "lose everything", "kill group")
"""Each ``kill group`` shows that the server before it knows all that it has to: the one that goes on, and the one that begins anew."""


def test_one_engine_serves_rightly_when_engines_and_their_server_are_killed_in_every_way(
    warden: Warden, server: Any, failover_model: Path, stock_answers: list[list[str]], tmp_path: Path, record_property: Any
) -> None:
    kinds = [FIRST, *random.Random(SEED).sample(CASES, len(CASES)), *LAST]
    run = Run(Story(server, failover_model, tmp_path), SEED, lambda line: sys.stdout.write(f"{line}\n"), nice=NICE)
    result = run.go(kinds, warden, stock_answers)
    for kind, seconds in result.recovery_s.items():
        record_property(kind, seconds)
    assert not result.findings, "\n".join(result.findings)
    assert result.max_primaries == 1
    assert result.wrong_tokens == result.failed_promotions == result.leftovers == result.unexpected_ends == 0
    assert set(result.kinds) == set(kinds)
    assert result.requests["answered"] > result.kills
    assert result.ok
    server.stop()
    assert warden.left() == []
