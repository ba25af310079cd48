"""What GMS takes from vLLM's configuration of a KV cache: its raw buffers, and what it says to the plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gms_core.errors import ConfigurationError, EngineUnsupported
from gms_vllm.kv_buffers import RawBuffers, check_contents, raw_buffers
from gms_vllm.kv_plan import check_explicit, layout_of


def each(*sizes: int, stride: int = 0) -> list[SimpleNamespace]:
    """Tensors of a configuration as they were before 0.30."""
    return [SimpleNamespace(size=size, shared_by=[f"layer {number}"], offset=0, block_stride=stride) for number, size in enumerate(sizes)]


def one(size: int, *layers: str) -> list[SimpleNamespace]:
    """Tensors of a configuration from 0.30 on: each names the size of the one buffer."""
    return [SimpleNamespace(size=size, layers=[layer], layer_stride=0, block_stride=64, offset=0) for layer in layers]


def config(tensors: list[SimpleNamespace], num_blocks: int = 10, block_size: int = 16) -> Any:
    spec = SimpleNamespace(block_size=block_size, page_size_bytes=4096, dtype=torch.float32)
    return SimpleNamespace(kv_cache_tensors=tensors, num_blocks=num_blocks, kv_cache_groups=[SimpleNamespace(layer_names=["a"], kv_cache_spec=spec)])


@pytest.mark.parametrize(
    ("tensors", "buffers"),
    [
        (each(100, 200, 100), (100, 200, 100)),
        (each(100, 100, 100, stride=64), (100,)),
        ([*each(300), *each(100, 100, stride=64), *each(50)], (300, 100, 50)),
        (one(700, "a"), (700,)),
        (one(700, "a", "b", "c"), (700,)),
        ([], ()),
    ],
)
def test_buffers_are_those_that_the_runner_makes_when_the_configuration_names_them(tensors: list[SimpleNamespace], buffers: tuple[int, ...]) -> None:
    assert raw_buffers(config(tensors)) == buffers


def test_each_buffer_is_placed_once_when_tensors_are_made() -> None:
    buffers = RawBuffers([100, 200, 100], lambda size: 7000 + size)
    assert [buffers.place(size) for size in (100, 64, 200, 200, 100, 100)] == [7100, None, 7200, None, 7100, None]
    buffers.check_complete()


def test_engine_is_refused_when_a_buffer_was_made_elsewhere() -> None:
    buffers = RawBuffers([100, 200], lambda size: size)
    buffers.place(200)
    with pytest.raises(EngineUnsupported, match="1 of its buffers"):
        buffers.check_complete()


def test_cache_with_static_sinks_is_refused() -> None:
    sinks = type("SinkFullAttentionSpec", (), {})()
    check_contents(config(each(100)))
    for spec in (sinks, SimpleNamespace(kv_cache_specs={"a layer": sinks})):
        one_group = config(each(100))
        one_group.kv_cache_groups[0].kv_cache_spec = spec
        with pytest.raises(EngineUnsupported, match="static sinks"):
            check_contents(one_group)


@pytest.mark.parametrize("other", [config(each(100, 200), block_size=32), config(each(100, 200, stride=1)), config(one(300, "a", "b"))])
def test_layouts_differ_when_blocks_lie_elsewhere(other: Any) -> None:
    assert layout_of(other) != layout_of(config(each(100, 200)))


def test_layout_does_not_depend_on_sizes_or_on_the_process_when_it_is_compared() -> None:
    larger = config(each(1000, 2000))
    larger.kv_cache_groups[0].kv_cache_spec.made_anew = object()
    assert layout_of(larger) == layout_of(config(each(100, 200), num_blocks=9))


def test_size_of_the_user_is_refused_when_it_is_not_that_of_the_plan() -> None:
    check_explicit(None, 100, "kv")
    check_explicit(100, 100, "kv")
    check_explicit(100, 0, "kv")  # a model without KV cache
    with pytest.raises(ConfigurationError, match=r"200 .*'kv'.* 100"):
        check_explicit(200, 100, "kv")
