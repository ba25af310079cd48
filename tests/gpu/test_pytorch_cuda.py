"""Publishing and materialising on a GPU: tensors are made in the arena, and come back in another mapping of the same memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from gms_core.client import ReadLease, WriteLease
from gms_core.devices import cuda_uuid
from gms_core.errors import OutOfMemory
from gms_core.layout import Identity
from gms_core.pytorch import capture, materialise, publish
from gms_core.vmm import open_driver
from tests.conftest import running_server
from tests.unit.pytorch.arenas import MIB, Memory

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SLAB = 64 * MIB


@pytest.fixture
def gpu() -> Iterator[Memory]:
    torch.cuda.init()
    memory = Memory(open_driver(cuda_uuid(0)), SLAB, capacity=2**30)
    yield memory
    torch.cuda.synchronize()
    memory.driver.close()  # the mappings stay: PyTorch's pools live as long as the process


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.register_buffer("gain", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 512)
        self.blocks = nn.ModuleList(Block(512) for _ in range(3))
        self.head = nn.Linear(512, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.window = self.embed.weight.detach()[3:7].t()
        self.scales = {"gpu": torch.rand(512), "host": torch.rand(3, device="cpu")}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.embed(tokens) * self.scales["gpu"]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(device: torch.device | str) -> Model:
    torch.manual_seed(0)
    with torch.device(device):
        return Model().requires_grad_(False)


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_parameters_lie_in_the_arena_when_they_are_made_under_capture(gpu: Memory) -> None:
    arena = gpu.writable()
    with capture(arena, CUDA):
        model = make(CUDA)
    outside = torch.rand(100, device=CUDA)
    assert all(arena.contains(parameter.data_ptr(), parameter.numel() * 4) for parameter in model.parameters())
    assert arena.contains(model.calls.data_ptr())
    assert not arena.contains(outside.data_ptr())


@pytest.mark.parametrize("captured", [True, False])
def test_outputs_are_equal_when_another_mapping_is_attached(gpu: Memory, captured: bool) -> None:
    arena, tokens, reports = gpu.writable(), torch.arange(64, device=CUDA), []
    if captured:
        with capture(arena, CUDA):
            model = make(CUDA)
    else:
        model = make(CUDA)
    expected = model(tokens)
    identity = id(model.embed.weight)
    manifest = publish(model, arena, device=CUDA, on_report=reports.append)
    assert id(model.embed.weight) == identity
    assert arena.contains(model.window.data_ptr())
    assert not arena.contains(model.calls.data_ptr())
    assert torch.equal(model(tokens), expected)
    if captured:
        assert reports[0].in_place_bytes >= parameter_bytes(model)
        assert reports[0].copied_bytes == 3 * 4
    else:
        assert reports[0].in_place_bytes == 0
    attached = gpu.read_only(arena)
    twin = make("meta")
    twin.scales["host"] = torch.empty(3)
    report = materialise(twin, manifest, attached, device=CUDA)
    torch.cuda.synchronize()
    assert report.shared_bytes == parameter_bytes(model)
    assert torch.equal(twin(tokens), expected)
    assert twin.calls.item() == 2
    assert twin.head.weight is twin.embed.weight
    assert attached.contains(twin.embed.weight.data_ptr())
    assert twin.window.data_ptr() == twin.embed.weight.data_ptr() + 3 * 512 * 4
    assert twin.scales["host"].device.type == "cpu"
    assert torch.equal(twin.scales["host"], model.scales["host"])


def test_graph_gives_equal_results_when_it_was_captured_on_attached_weights(gpu: Memory) -> None:
    arena, tokens = gpu.writable(), torch.arange(64, device=CUDA)
    with capture(arena, CUDA):
        model = make(CUDA)
    manifest = publish(model, arena, device=CUDA)
    twin = make("meta")
    twin.scales["host"] = torch.empty(3)
    materialise(twin, manifest, gpu.read_only(arena), device=CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        twin(tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = twin(tokens)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(result, model(tokens))


def test_freed_memory_is_used_again_when_the_module_is_published(gpu: Memory) -> None:
    arena = gpu.writable()
    with capture(arena, CUDA):
        temporary = torch.empty(48 * MIB, dtype=torch.uint8, device=CUDA)
        model = make(CUDA)
        del temporary
    other = nn.Linear(2048, 2048, device=CUDA)
    model.late = other
    used = arena.used
    gc.collect()
    publish(model, arena, device=CUDA)
    assert arena.contains(other.weight.data_ptr())
    assert arena.used <= used + MIB


def test_published_bytes_stay_when_pytorch_empties_its_cache(gpu: Memory) -> None:
    arena = gpu.writable()
    with capture(arena, CUDA):
        model = make(CUDA)
    manifest = publish(model, arena, device=CUDA)
    expected = [parameter.cpu() for parameter in model.parameters()]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    with capture(gpu.writable(), CUDA):
        torch.full((4 * MIB,), 7, dtype=torch.uint8, device=CUDA)
    twin = make("meta")
    twin.scales["host"] = torch.empty(3)
    materialise(twin, manifest, gpu.read_only(arena), device=CUDA)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(twin.parameters(), expected, strict=True))


def test_own_error_is_raised_when_the_arena_cannot_grow(gpu: Memory) -> None:
    arena = gpu.writable()
    gpu.refuse = True
    with pytest.raises(OutOfMemory, match="says the test") as caught, capture(arena, CUDA):
        torch.empty(1000, device=CUDA)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    gpu.refuse = False
    with capture(arena, CUDA):
        assert arena.contains(torch.empty(1000, device=CUDA).data_ptr())


def test_engine_attaches_to_what_another_published_when_a_device_server_is_between(runtime_dir) -> None:
    torch.cuda.init()
    identity = Identity({"content": "abc"})
    with running_server(runtime_dir, cuda_uuid(0)) as server, server.connect() as writer, server.connect() as reader:
        lease = writer.acquire("weights", "auto", identity, timeout_s=10)
        assert isinstance(lease, WriteLease)
        with capture(lease.arena, CUDA):
            model = make(CUDA)
        tokens = torch.arange(64, device=CUDA)
        expected = model(tokens)
        published = lease.commit(publish(model, lease.arena, device=CUDA), identity)
        assert torch.equal(model(tokens), expected)
        attached = reader.acquire("weights", "auto", identity, timeout_s=10)
        assert isinstance(attached, ReadLease)
        twin = make("meta")
        twin.scales["host"] = torch.empty(3)
        materialise(twin, attached.layout.manifest, attached.map(), device=CUDA)
        assert torch.equal(twin(tokens), expected)
        assert attached.layout.size <= parameter_bytes(model) + 40 * MIB
        torch.cuda.synchronize()
        del twin, model
        gc.collect()
        attached.release()
        published.release()
