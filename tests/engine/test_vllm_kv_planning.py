"""How an engine that fails over comes to its budget, with vLLM's own classes and without an engine: identity, start-up checks."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gms_core.engine_config import FailoverConfig, GmsConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports warn about things that are not ours
    import vllm.v1.worker.gpu_worker as gpu_worker
    from vllm.engine.arg_utils import EngineArgs

    from gms_vllm import accounting
    from gms_vllm.kv_identity import kv_fields

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GIB = 2**30


@dataclass
class Snapshot:
    """Of a device whose free memory changes between two measurements."""

    free: list[int]
    total_memory: int = 100 * GIB
    free_memory: int = field(init=False)
    device_: str = "a device"

    def __post_init__(self) -> None:
        self.measure()

    def measure(self) -> None:
        self.free_memory = self.free.pop(0)


def without_seam(init_snapshot: Any, cache_config: Any) -> int:
    """As vLLM had it before it knew of weights in other processes."""
    requested = math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization)
    if init_snapshot.free_memory < requested:
        raise ValueError("less than desired")
    return requested


@pytest.fixture(params=["seam", "no seam"])
def arguments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What vLLM passes beside the snapshot, with 10 GiB of shared weights."""
    monkeypatch.setattr(accounting, "external_bytes", lambda config, options: 10 * GIB)
    cache = SimpleNamespace(gpu_memory_utilization=0.5)
    if request.param == "seam":
        return cache, 10 * GIB
    monkeypatch.setattr(gpu_worker, "request_memory", without_seam)
    return (cache,)


def test_engine_needs_no_room_when_it_adopts_a_plan(arguments: tuple[Any, ...]) -> None:
    with accounting.startup_check(SimpleNamespace(), GmsConfig(), lambda: True):
        assert gpu_worker.request_memory(Snapshot([1 * GIB, 1 * GIB]), *arguments) == 40 * GIB


def test_room_is_measured_anew_when_the_engine_makes_the_plan(arguments: tuple[Any, ...]) -> None:
    with accounting.startup_check(SimpleNamespace(), GmsConfig(), lambda: False):
        assert gpu_worker.request_memory(Snapshot([1 * GIB, 41 * GIB]), *arguments) == 40 * GIB
        with pytest.raises(ValueError, match="ess than"):
            gpu_worker.request_memory(Snapshot([41 * GIB, 29 * GIB]), *arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import write_model

    return write_model(tmp_path_factory.mktemp("model"), "llama")


def fields_of(model: Path, tag: str = "weights", lock: str = "gms:a", **arguments: Any) -> dict[str, str]:
    config = EngineArgs(model=str(model), dtype="float32", max_model_len=64, enforce_eager=True, **arguments).create_engine_config()
    return kv_fields(config, GmsConfig(tag=tag), FailoverConfig(lock=lock))


def test_identity_tells_engines_apart_when_their_blocks_would_differ(model: Path) -> None:
    plain = fields_of(model)
    assert fields_of(model, gpu_memory_utilization=0.3, kv_cache_memory_bytes=2**24, max_num_seqs=7) == plain
    for differing, arguments in (
        ("kv_block_size", {"block_size": 64}),
        ("kv_num_gpu_blocks_override", {"num_gpu_blocks_override": 9}),
        ("kv_enable_prefix_caching", {"enable_prefix_caching": False}),
        ("speculative", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}),
        ("weights", {"tag": "others"}),
        ("lock", {"lock": "gms:b"}),
    ):
        other = fields_of(model, **arguments)  # type: ignore[arg-type]
        assert other.get(differing) != plain.get(differing), differing
