"""Real SGLang engines on CPU that stand in for one another: one plan for all, scratch until the promotion, the right tokens after it."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from chaos.squatter import squatting
from failover_story import until
from models import write_model
from sglang_site import Program, Site

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FAILOVER = {"lock": "gms:test", "alias_bytes": 2**20}
UNCAPPED = {"max_total_tokens": None}
"""An engine that would take a fifth of the machine's memory, if it made a plan of its own."""
TOKENS = 4096
FEW = 3
"""Tokens of an answer where ranks wait for one another at each layer."""
KV_BYTES = TOKENS * 2 * 2 * 32 * 2 * 4
"""Layers, heads, elements of a head, keys and values, bytes of an element."""


@pytest.fixture
def site(server: Any, tmp_path: Path) -> Site:
    return Site(server.directory, tmp_path)


def shadow(site: Site, model: Path, **options: Any) -> AbstractContextManager[Program]:
    return site.program(model, {"failover": FAILOVER}, **options)


def stock(site: Site, model: Path, **options: Any) -> list[list[int]]:
    """What an engine without GMS says."""
    with site.program(model, None, **options) as engine:
        assert engine.answer() == {"ready": True}
        found: list[list[int]] = engine.ask("tokens")
        return found


def refused(answer: Any, words: str) -> bool:
    return words in str(answer)


@contextlib.contextmanager
def without_new_memory(pid: int) -> Iterator[None]:
    """A process in which no memory of the driver can be made meanwhile: that is a file."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def promoted(engine: Program, epoch: int) -> None:
    (told,) = engine.ask("front_end_call", "promote", timeout_s=60.0)
    assert (told["answer"]["rank"], told["answer"]["epoch"]) == (0, epoch)


def test_tokens_are_right_when_one_engine_after_the_other_is_promoted_and_killed(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    expected = stock(site, model)
    with shadow(site, model) as first:
        assert first.answer() == {"ready": True}
        assert refused(first.ask("tokens"), "this engine is a shadow")
        assert first.ask("front_end_call", "stand_by") == [{"answer": [0, ""]}]
        (place,) = first.ask("front_end_call", "place")
        assert place["answer"] == {"rank": 0, "socket": str(site.runtime_dir / "host.sock")}
        assert first.ask("call", "rehearse", wanted=True) is None
        assert len(first.ask("tokens")) == len(expected)  # of whatever kind: it was computed on scratch
        until(lambda: first.ask("front_end_call", "unfinished") == [{"answer": 0}], "the last request is put away")
        assert first.ask("front_end_call", "forget") == [{"answer": True}]
        assert first.ask("front_end_call", "settle") == [{"answer": None}]
        promoted(first, epoch=1)
        promoted(first, epoch=1)
        assert first.ask("tokens") == expected
        assert first.ask("front_end_call", "beat") == [{"answer": True}]
        (unknown,) = first.ask("front_end_call", "dance")
        assert unknown["error"]["code"] == "invalid_argument"

        fewer = shadow(site, model, max_total_tokens=TOKENS // 2)
        other_pages = shadow(site, model, page_size=16)
        with fewer as small, other_pages as paged, shadow(site, model, **UNCAPPED) as second:
            assert f"--max-total-tokens {TOKENS // 2} is less than" in small.refusal()
            assert "kv_page_size" in paged.refusal()
            assert second.answer() == {"ready": True}
            assert second.ask("size") == first.ask("size") == TOKENS
            assert second.ask("release") is None
            assert second.memory()[0] == 0
            assert refused(second.ask("call", "promote", timeout_s=0.5), "this engine is asleep")
            assert second.ask("resume") is None
            assert refused(second.ask("call", "promote", timeout_s=0.5), "was not granted")
            assert refused(second.ask("tokens"), "this engine is a shadow")
            assert first.ask("tokens") == expected
            first.kill()
            promoted(second, epoch=2)
            assert second.ask("tokens") == expected
            mapped, _ = second.memory()
            assert second.ask("release") is None
            assert refused(second.ask("tokens"), "this engine is asleep")
            assert second.memory()[0] == 0
            assert second.ask("resume") is None
            assert second.memory()[0] == mapped > KV_BYTES
            assert second.ask("tokens") == expected


def test_no_rank_computes_when_one_cannot_be_promoted_or_woken_up(server: Any, site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    cpus = sorted(os.sched_getaffinity(0))[:2]
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus))}
    with shadow(site, model, environment=variables, tp_size=2) as engine:
        assert engine.answer() == {"ready": True}
        with server.connect("test") as session:
            status = session.status()
        (pool,) = (pool for pool in status.retained if pool.name.endswith(".1"))
        (second,) = {member.pid for cohort in status.cohorts for member in cohort.members if member.process.startswith("rank 1")}
        with squatting(server.socket, "squatter", pool) as squatter:
            squatter.until_it("holds")
            for _ in range(2):
                could, could_not = engine.ask("front_end_call", "promote", timeout_s=0.5)
                assert (could["answer"]["rank"], could_not["error"]["code"]) == (0, "acquire_timeout")
                assert refused(engine.ask("tokens", FEW), "this engine is a shadow")
        assert engine.ask("call", "promote", timeout_s=60.0) is None
        expected = engine.ask("tokens", FEW)
        assert [len(tokens) for tokens in expected] == [FEW] * 3

        assert refused(engine.ask("call", "promote"), "timeout_s")  # ranks that are all promoted stay so
        assert engine.ask("tokens", FEW) == expected
        assert engine.ask("release") is None
        with without_new_memory(second):
            for _ in range(2):
                assert refused(engine.ask("resume"), "EFBIG")
                until(lambda: engine.memory()[0] == 0, "all ranks are asleep again")  # the first one answers for those that agreed with it
                assert refused(engine.ask("tokens", FEW), "this engine is asleep")
        assert engine.ask("resume") is None
        assert engine.ask("tokens", FEW) == expected


@pytest.mark.long
def test_successor_is_right_when_attention_is_latent(site: Site, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "deepseek-v2-yarn")
    expected = stock(site, model)
    with shadow(site, model) as first:
        assert first.answer() == {"ready": True}
        with shadow(site, model, **UNCAPPED) as second:
            assert second.answer() == {"ready": True}
            promoted(first, epoch=1)
            assert first.ask("tokens") == expected
            first.kill()
            promoted(second, epoch=2)
            assert second.ask("tokens") == expected
