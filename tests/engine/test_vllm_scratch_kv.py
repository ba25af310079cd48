"""Real vLLM engines on CPU that stand in for one another: one plan for all, a KV cache on scratch until the promotion, the right tokens after it."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from models import write_model
from site_of_engines import Engine, Site, stock, two_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FAILOVER = {"lock": "gms:test", "alias_bytes": 2**20}
KV_BYTES = 16 * 2**20
UNMEASURED = {"kv_cache_memory_bytes": None}
"""An engine that would take nearly all of the machine's memory, if it made a plan of its own."""


def shadow(site: Site, model: Path, **options: Any) -> Any:
    return site.engine(model, failover=FAILOVER, **options)


def promoted(engine: Engine, epoch: int, ranks: int = 1) -> None:
    told = engine.ask("promote 60")
    assert "answers" in told, told
    assert [(answer["rank"], answer["epoch"], answer["bytes"]) for answer in told["answers"]] == [(rank, epoch, KV_BYTES) for rank in range(ranks)]


def end_at_once(engine: Engine) -> None:
    os.killpg(engine.process.pid, signal.SIGKILL)
    engine.process.wait(60)


def test_tokens_are_right_when_one_engine_after_the_other_is_promoted_and_killed(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with site.engine(**stock(model)) as unshared, shadow(site, model) as first:
        expected, planned = unshared.answer()["tokens"], first.answer()
        unshared.end()
        weights = planned["figures"]["bytes"]
        for step in ("step", "step execute_model", "step sample_tokens"):
            assert first.ask(step)["error"] == "not_promoted"
        promoted(first, epoch=1)
        promoted(first, epoch=1)
        assert first.again()["tokens"] == expected
        assert first.ask("beat")["answers"] == [True]
        with shadow(site, model, arguments=UNMEASURED) as second:
            adopted = second.answer()
            assert (adopted["blocks"], adopted["kv_bytes"]) == (planned["blocks"], KV_BYTES)
            assert second.ask("sleep 1")["mapped"] == 0
            assert second.ask("promote 0.5")["error"] == "engine_asleep"
            second.ask("wake")
            refused = second.ask("promote 0.5")
            assert refused["error"] == "acquire_timeout"
            assert second.ask("step")["error"] == "not_promoted"
            assert first.again()["tokens"] == expected
            end_at_once(first)
            promoted(second, epoch=2)
            assert second.again()["tokens"] == expected
            assert second.ask("sleep 1")["mapped"] == 0
            assert second.ask("step")["error"] == "engine_asleep"
            assert second.ask("wake")["mapped"] == weights + KV_BYTES + mmap.PAGESIZE
            assert second.again()["tokens"] == expected


def test_successor_is_right_when_layers_have_caches_of_different_kinds(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "gemma3")
    with site.engine(**stock(model)) as unshared, shadow(site, model) as first, shadow(site, model) as second:
        expected = unshared.answer()["tokens"]
        unshared.end()
        assert second.answer()["blocks"] == first.answer()["blocks"]
        assert first.ask("promote 60")["error"] is None
        assert first.again()["tokens"] == expected
        end_at_once(first)
        assert second.ask("promote 60")["answers"][0]["epoch"] == 2
        assert second.again()["tokens"] == expected


def test_all_ranks_take_over_when_there_are_several(site: Site, tmp_path: Path) -> None:
    model, options = write_model(tmp_path / "model", "llama"), two_ranks()
    with site.engine(**stock(model)) as unshared, shadow(site, model, **options) as first:
        expected, planned = unshared.answer()["tokens"], first.answer()
        unshared.end()
        promoted(first, epoch=1, ranks=2)
        assert first.again()["tokens"] == expected
        with shadow(site, model, **options) as second:
            assert second.answer()["blocks"] == planned["blocks"]
            end_at_once(first)
            promoted(second, epoch=2, ranks=2)
            assert second.ask("beat")["answers"] == [True, True]
            assert second.again()["tokens"] == expected


def test_engine_is_refused_when_its_kv_cache_cannot_be_that_of_the_others(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    with shadow(site, model) as first, shadow(site, model) as asked_too_early:
        first.answer()
        asked_too_early.answer()
        assert asked_too_early.again()["error"] == "not_promoted"
        assert asked_too_early.ask("promote 5")["error"] == "engine_failed"
        larger = site.run(model, failover=FAILOVER, arguments={"kv_cache_memory_bytes": 2 * KV_BYTES})
        assert larger["error"] == "configuration"
        assert str(KV_BYTES) in larger["message"]
        assert str(2 * KV_BYTES) in larger["message"]
        fewer = site.run(model, failover=FAILOVER, arguments={"num_gpu_blocks_override": 8})
        assert fewer["error"] == "identity_mismatch"
        assert "kv_num_gpu_blocks_override" in fewer["message"]
        promoted(first, epoch=1)
