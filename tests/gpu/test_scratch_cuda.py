"""Scratch on a GPU: what is captured on it is right once the pool's memory lies beneath, and until then it costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from gms_core.client import RetainedArena
from gms_core.client.arena import Received, Take
from gms_core.devices import cuda_uuid
from gms_core.layout import Allocation
from gms_core.protocol.framing import close_descriptors
from gms_core.pytorch import placed
from gms_core.vmm import open_driver
from gms_core.vmm.driver import Access, Address, Driver, Handle

pytestmark = pytest.mark.gpu

MIB, GIB = 2**20, 2**30
CUDA = torch.device("cuda", 0)


class Pool:
    """A pool's memory, as the server would send it: zeros."""

    def __init__(self, driver: Driver, sizes: Sequence[int]) -> None:
        self.driver = driver
        self.allocations: list[Allocation] = []
        self.handles: list[Handle] = []
        offset = 0
        for number, size in enumerate(sizes):
            self.handles.append(driver.create(size))
            self.allocations.append(Allocation(number, offset, size))
            offset += size

    def receive(self, take: Take) -> None:
        for one, handle in zip(self.allocations, self.handles, strict=True):
            item = Received(one.id, one.size, self.driver.export(handle))
            try:
                take([item])
            finally:
                close_descriptors([item.descriptor])


@pytest.fixture(scope="module", autouse=True)
def captured_once() -> None:
    """CUDA opens a socket for itself when a process captures its first graph, and keeps it."""
    values = torch.zeros(1, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values.add_(1)
    graph.replay()
    torch.cuda.synchronize()


@pytest.fixture
def driver() -> Iterator[Driver]:
    torch.cuda.init()
    torch.zeros(1, device=CUDA)
    opened = open_driver(cuda_uuid(0))
    yield opened
    torch.cuda.synchronize()
    opened.close()


def test_graph_uses_the_pools_memory_when_it_was_captured_on_scratch(driver: Driver) -> None:
    arena = RetainedArena(driver, 256 * MIB)
    arena.map_scratch(8 * MIB)
    layers = iter(range(4))
    with placed(lambda size: arena.base + next(layers) * size, CUDA):
        caches = [torch.zeros(64 * MIB, dtype=torch.int8, device=CUDA).view(torch.float32) for _ in range(4)]
    slots, values = torch.arange(0, 16 * MIB, 4096, device=CUDA), torch.zeros(4096, device=CUDA)
    total = torch.zeros((), device=CUDA)

    def step() -> None:
        for number, cache in enumerate(caches):
            cache[slots] = values + number
        total.copy_(sum(cache[slots].sum() for cache in caches))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()

    pool = Pool(driver, [192 * MIB, 64 * MIB])
    arena.adopt(pool.receive, pool.allocations)
    arena.map_pool()
    for cache in caches:
        cache.zero_()
    values.fill_(5)
    graph.replay()
    torch.cuda.synchronize()
    assert [cache.double().sum().item() for cache in caches] == [4096.0 * (5 + number) for number in range(4)]
    assert total.item() == sum(4096.0 * (5 + number) for number in range(4))

    arena.unmap()
    other = driver.reserve(192 * MIB)
    driver.map(other, 192 * MIB, pool.handles[0])
    driver.set_access(other, 192 * MIB, Access.READ)
    assert driver.read(Address(other + 64 * MIB), 4) == torch.tensor([6.0]).numpy().tobytes()
    driver.unmap(other, 192 * MIB)
    driver.free_reservation(other, 192 * MIB)
    arena.close()


@pytest.mark.parametrize("alias_bytes", [64 * MIB, 256 * MIB])
def test_only_the_alias_is_taken_when_scratch_is_mapped(driver: Driver, alias_bytes: int) -> None:
    arena = RetainedArena(driver, 32 * GIB)
    before = driver.memory_info().free
    assert arena.map_scratch(alias_bytes) == alias_bytes
    # Page tables come to it, which is why the bound is not exact.
    assert alias_bytes <= before - driver.memory_info().free < alias_bytes + 256 * MIB
    everything = torch.cuda.current_stream()
    with placed(lambda size: arena.base, CUDA):
        cache = torch.empty(32 * GIB, dtype=torch.uint8, device=CUDA)
    cache.fill_(3)
    everything.synchronize()
    assert cache[-1].item() == 3
    del cache
    arena.close()
    assert before - driver.memory_info().free < 64 * MIB


def test_scratch_is_private_when_two_arenas_have_it(driver: Driver) -> None:
    first, second = (RetainedArena(driver, 64 * MIB) for _ in range(2))
    for arena in (first, second):
        arena.map_scratch(4 * MIB)
    driver.write(first.base, b"\x11" * MIB)
    driver.write(second.base, b"\x22" * MIB)
    assert driver.read(Address(first.base + 60 * MIB), MIB) == b"\x11" * MIB
    assert driver.read(Address(second.base + 60 * MIB), MIB) == b"\x22" * MIB
    for arena in (first, second):
        arena.close()
