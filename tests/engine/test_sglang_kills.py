"""Real SGLang engines that are killed, one after the other, while requests flow; as `test_failover_kills.py` does with vLLM.

`make chaos ENGINE=sglang` kills them in every way.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos.run import Run
from chaos.warden import Warden
from sglang_story import SglangStory

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2700)]

SEED = 4
CASES = ("kill api-server 0", "kill rank 0", "stop detokenizer", "kill promoting")
LAST = ("kill server", "kill group")


def test_one_engine_serves_rightly_when_engines_and_their_server_are_killed(
    warden: Warden, server: Any, failover_model: Path, tmp_path: Path, record_property: Any
) -> None:
    story = SglangStory(server, failover_model, tmp_path)
    kinds = [*random.Random(SEED).sample(CASES, len(CASES)), *LAST]
    run = Run(story, SEED, lambda line: sys.stdout.write(f"{line}\n"))
    result = run.go(kinds, warden, story.stock_answers())
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
