"""The KV memory of TensorRT-LLM's engines that fail over: planned by the first one, and mapped by whichever is promoted."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trtllm_engines import by_the_adapter
from trtllm_servers import PATIENCE_S, Engine, Start, answer

from gms_core.errors import EngineUnsupported, OutOfMemory
from gms_core.kv.retained import RetainedKv
from gms_core.pytorch.kv import clearing
from gms_core.vmm import open_driver
from tests.conftest import RunningServer
from tests.trtllm_double import MERGED_FIRST, STAGED_HOOKS, WITHOUT_GMS
from tests.unit.publishing import until

pytestmark = pytest.mark.timeout(300)
FREE, LESS, MORE = str(2**22), str(2**20), str(2**23)
ALIASED = json.dumps({"alias_bytes": 4096})
"""All blocks of a cache on scratch are one: nothing that is computed there is right."""


def engine_of(start: Start, tmp_path: Path, name: str, free: str, *, failover: str = ALIASED, **kv: Any) -> Engine:
    """An engine whose device has so many bytes free."""
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"kv_cache_config": {"free_gpu_memory_fraction": 0.9, **kv}}))
    return start(name, "--config", str(file), failover=failover, TRTLLM_DOUBLE_FREE=free, TLLM_LOG_LEVEL="INFO")


def blocks(engine: Engine) -> set[int]:
    """Of the KV caches of all ranks."""
    return {int(found) for found in re.findall(r"KV cache: (\d+) blocks in", engine.log)}


def pools(server: RunningServer) -> dict[str, Any]:
    """The pools of KV memory, by their names."""
    with server.connect() as session:
        return {pool.name: pool for pool in session.status().retained}


@pytest.mark.parametrize("variant", [WITHOUT_GMS, MERGED_FIRST, STAGED_HOOKS], indirect=True)
def test_shadow_has_the_cache_of_the_first_engine_on_scratch_until_it_is_promoted(start: Start, server: RunningServer, tmp_path: Path) -> None:
    first = engine_of(start, tmp_path, "one", FREE, use_kv_cache_manager_v2=True)
    first.becomes("primary")
    expected = answer(first)
    assert expected == answer(first)  # of what it has kept
    second = engine_of(start, tmp_path, "two", LESS, use_kv_cache_manager_v2=True)
    second.becomes("standby")
    assert blocks(first) == blocks(second)
    assert "nothing is measured" in second.log
    held = {name: pool.epoch for name, pool in pools(server).items()}
    assert sorted(held) == ["kv_cache", "kv_cache.1"]
    os.kill(first.pid("rank 1"), signal.SIGKILL)
    second.becomes("primary")
    assert answer(second) == expected
    assert all(pool.epoch > held[name] for name, pool in pools(server).items())


@by_the_adapter
def test_cache_of_an_engine_of_its_own_is_planned_too(variant: str, start: Start, server: RunningServer, tmp_path: Path) -> None:
    first = engine_of(start, tmp_path, "one", FREE)
    first.becomes("primary")
    expected = answer(first)
    second = engine_of(start, tmp_path, "two", MORE)
    second.becomes("standby")
    assert blocks(first) == blocks(second)
    third = engine_of(start, tmp_path, "three", LESS)
    third.becomes("standby")
    assert "the device has no room for more" in third.log
    first.process.kill()
    until(lambda: "primary" in {getattr(engine.cohort, "role", None) for engine in (second, third)}, patience_s=PATIENCE_S)
    assert answer(second) == expected
    assert len(pools(server)) == 2


@by_the_adapter
def test_engine_is_refused_when_it_cannot_have_the_cache_that_is_planned(variant: str, start: Start, tmp_path: Path) -> None:
    first = engine_of(start, tmp_path, "one", FREE)
    first.becomes("primary")
    for name, sentence, kv in (
        ("small", "kv_cache_config.max_tokens 64 is less than pool 'kv_cache' was planned with", {"max_tokens": 64}),
        ("other", "kv_memory", {"use_kv_cache_manager_v2": True}),
        ("unlike", "kv_options", {"enable_block_reuse": False}),
    ):
        engine = engine_of(start, tmp_path, name, FREE, **kv)
        assert engine.process.wait(PATIENCE_S) != 0
        assert sentence in engine.log
    assert answer(first)


@pytest.fixture
def storage(variant: str) -> Any:
    """The double's own storage of V2."""
    return importlib.import_module("tensorrt_llm.runtime.kv_cache_manager_v2._storage._core")


class Ranges:
    """Makes ranges of addresses, as a rank does."""

    def __init__(self) -> None:
        self.made: list[RetainedKv] = []

    def __call__(self, buffers: Sequence[int]) -> RetainedKv:
        self.made.append(RetainedKv(open_driver("host"), clearing(torch.device("cpu")), buffers, 4096))
        return self.made[-1]


@by_the_adapter
def test_pools_lie_side_by_side_when_they_are_placed(variant: str, storage: Any) -> None:
    from gms_trtllm.kv_placing import can_place, placing

    assert can_place()
    ranges, original = Ranges(), storage.VirtMem
    with placing(ranges):
        cache = storage.GpuCacheLevelStorage(2**20, [2**13, 2**13], 2**16)
        assert not ranges.made  # sizes first
        keys, values = cache.slot_address(0)
    (memory,) = ranges.made
    assert memory.buffers == (2**19, 2**19)
    assert (keys, values) == (memory.arena.base, memory.arena.base + 2**19)
    assert storage.VirtMem is original
    with placing(ranges):
        storage.GpuCacheLevelStorage(2**20, [2**13], 2**16).slot_address(0)
        with pytest.raises(EngineUnsupported, match="a second KV cache"):
            storage.GpuCacheLevelStorage(2**20, [2**13], 2**16)
    for memory in ranges.made:
        memory.arena.close()


@by_the_adapter
def test_placed_pool_grows_and_shrinks_within_its_room_alone(variant: str, storage: Any) -> None:
    from gms_trtllm.kv_placing import placing

    ranges = Ranges()
    with placing(ranges):
        pool = storage.GpuSlotPool(2**13, 2**24, SimpleNamespace(phys_mem_size=2**16), 64)
    address = pool.slot_address(0)
    pool.resize(8)
    assert pool.num_slots == 8
    pool.resize(64)
    assert (pool.num_slots, pool.slot_address(0)) == (64, address)
    with pytest.raises(OutOfMemory, match="cannot grow beyond the 8 chunks"):
        pool.resize(65)
    pool.destroy()
    ranges.made[0].arena.close()


@by_the_adapter
def test_nothing_is_placed_when_v2_is_not_as_it_is_known(variant: str, storage: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from gms_trtllm.kv_placing import can_place

    with caplog.at_level("INFO"), monkeypatch.context() as changed:
        changed.setattr(storage, "__file__", "/site/_core.cpython-312-x86_64-linux-gnu.so")
        assert not can_place()
    with caplog.at_level("INFO"), monkeypatch.context() as changed:
        changed.delattr(storage.VirtMem, "realloc")
        assert not can_place()
    assert "is compiled" in caplog.text
    assert "VirtMem.realloc" in caplog.text
    assert can_place()
