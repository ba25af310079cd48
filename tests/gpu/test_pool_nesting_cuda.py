"""Memory pools of PyTorch inside each other, and scopes that are left for the weights: what loading needs inside TensorRT-LLM's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from gms_core.client.arena import Arena
from gms_core.devices import cuda_uuid
from gms_core.pytorch import capture
from gms_core.pytorch.cuda_pool import ArenaPool
from gms_core.vmm import open_driver
from gms_trtllm import outer_pool
from tests.unit.pytorch.arenas import MIB, Memory

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
NESTS = Version(torch.__version__.partition("+")[0]) >= Version("2.10")


@pytest.fixture(scope="module", autouse=True)
def context() -> None:
    """The sockets that CUDA opens for a process are nothing that a test has left behind."""
    torch.zeros(1, device=CUDA)
    torch.cuda.synchronize()


@pytest.fixture
def gpu() -> Iterator[Memory]:
    torch.cuda.init()
    memory = Memory(open_driver(cuda_uuid(0)), 64 * MIB, capacity=2**30)
    yield memory
    torch.cuda.synchronize()
    memory.driver.close()  # the mappings stay: PyTorch's pools live as long as the process


def tensor() -> torch.Tensor:
    """One that needs a segment of its own, so that no free block elsewhere can hold it."""
    return torch.full((24 * MIB,), 7, dtype=torch.uint8, device=CUDA)


def in_pool(pool: torch.cuda.MemPool, one: torch.Tensor) -> bool:
    return any(segment["address"] <= one.data_ptr() < segment["address"] + segment["total_size"] for segment in pool.snapshot())


class Scopes:
    """Scopes of virtual memory as TensorRT-LLM keeps them: one inside another leaves the outer one, which goes on with a fresh pool afterwards."""

    def __init__(self) -> None:
        self._pool_stack: list[Any] = []

    @contextlib.contextmanager
    def scope(self, arena: Arena) -> Iterator[None]:
        if self._pool_stack:
            self._pool_stack[-1][0].__exit__(None, None, None)
        self._pool_stack.append(self._entered(ArenaPool(arena, CUDA)._allocator))
        try:
            yield
        finally:
            self._pool_stack.pop()[0].__exit__(None, None, None)
            if self._pool_stack:
                self._pool_stack[-1] = self._entered(self._pool_stack[-1][1])

    @staticmethod
    def _entered(allocator: Any) -> tuple[Any, Any]:
        context = torch.cuda.use_mem_pool(torch.cuda.MemPool(allocator))
        context.__enter__()
        return context, allocator


@pytest.fixture
def scopes(monkeypatch: pytest.MonkeyPatch) -> Scopes:
    made = Scopes()
    monkeypatch.setitem(sys.modules, "tensorrt_llm._torch.virtual_memory", SimpleNamespace(_pool_stack=made._pool_stack))  # type: ignore[arg-type]
    return made


def holds(arena: Arena, one: torch.Tensor) -> bool:
    return bool(arena.contains(one.data_ptr(), one.numel()))


@pytest.mark.skipif(not NESTS, reason="needs PyTorch 2.10 or later, which nests pools")
def test_inner_pool_has_what_is_made_in_it_when_pools_are_nested() -> None:
    outer, inner = torch.cuda.MemPool(), torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(outer):
        before = tensor()
        with torch.cuda.use_mem_pool(inner):
            inside = tensor()
        after = tensor()
    outside = tensor()
    assert [in_pool(outer, one) for one in (before, inside, after, outside)] == [True, False, True, False]
    assert [in_pool(inner, one) for one in (before, inside, after, outside)] == [False, True, False, False]


@pytest.mark.skipif(not NESTS, reason="needs PyTorch 2.10 or later, which nests pools")
def test_weights_lie_in_the_arena_when_another_pool_is_open_and_not_left(gpu: Memory) -> None:
    weights, virtual = gpu.writable(), gpu.writable()
    with torch.cuda.use_mem_pool(ArenaPool(virtual, CUDA).mem_pool):
        with capture(weights, CUDA):
            inside = tensor()
        after = tensor()
    assert (holds(weights, inside), holds(virtual, inside)) == (True, False)
    assert (holds(weights, after), holds(virtual, after)) == (False, True)


def test_weights_lie_in_the_arena_and_the_scope_goes_on_when_it_is_left_for_them(gpu: Memory, scopes: Scopes) -> None:
    weights, virtual = gpu.writable(), gpu.writable()
    with scopes.scope(virtual):
        before = tensor()
        freed = tensor()
        with outer_pool.outside():
            del freed
            other = tensor()
            with capture(weights, CUDA):
                inside = tensor()
        after = tensor()
    outside = tensor()
    torch.cuda.synchronize()
    assert [holds(weights, one) for one in (before, other, inside, after, outside)] == [False, False, True, False, False]
    assert [holds(virtual, one) for one in (before, other, inside, after, outside)] == [True, False, False, True, False]
    assert all(bool((one == 7).all()) for one in (before, other, inside, after, outside))


def test_both_scopes_go_on_when_the_inner_one_is_left(gpu: Memory, scopes: Scopes) -> None:
    weights, first, second = gpu.writable(), gpu.writable(), gpu.writable()
    with scopes.scope(first):
        with scopes.scope(second):
            with outer_pool.outside(), capture(weights, CUDA):
                inside = tensor()
            in_second = tensor()
        in_first = tensor()
    made = (inside, in_second, in_first)
    assert [[holds(arena, one) for one in made] for arena in (weights, second, first)] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_scope_goes_on_when_what_it_was_left_for_has_failed(gpu: Memory, scopes: Scopes) -> None:
    weights, virtual = gpu.writable(), gpu.writable()
    with scopes.scope(virtual):
        with pytest.raises(ValueError, match="says the test"), outer_pool.outside(), capture(weights, CUDA):
            raise ValueError("says the test")
        after = tensor()
    assert (holds(virtual, after), holds(virtual, tensor())) == (True, False)


def test_graph_gives_the_same_when_it_is_captured_in_a_scope_that_was_left_for_its_weights(gpu: Memory, scopes: Scopes) -> None:
    weights, virtual = gpu.writable(), gpu.writable()
    with scopes.scope(virtual):
        with outer_pool.outside(), capture(weights, CUDA):
            weight = torch.rand(512, 512, device=CUDA)
        given = torch.rand(64, 512, device=CUDA)
        expected = given @ weight
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = given @ weight
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)
    assert holds(weights, weight.view(torch.uint8).flatten()[:1])
