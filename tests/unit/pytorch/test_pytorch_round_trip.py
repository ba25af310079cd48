"""What a writer publishes is what a reader gets: content, ties, views, classes, attributes."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gms_core.pytorch.tensors as tensors
from gms_core.pytorch import check_no_meta, materialise, publish
from gms_core.vmm.host import HostDriver
from tests.unit.pytorch.arenas import MIB, Memory
from tests.unit.pytorch.modules import KINDS, Operation, PackedParameter, build, content, state, structure

CPU = torch.device("cpu")

SIZES = st.integers(0, 4)
OPERATIONS = st.lists(
    st.builds(
        Operation,
        kind=st.sampled_from(KINDS),
        where=st.integers(0, 9),
        which=st.integers(0, 9),
        shape=st.one_of(st.tuples(), st.tuples(SIZES), st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES)),
        dtype=st.integers(0, 5),
        flag=st.booleans(),
    ),
    min_size=1,
    max_size=14,
)


def total(parameters):
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@pytest.mark.parametrize("swaps", [True, False])
@given(operations=OPERATIONS, seed=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_twin_equals_the_writer_when_it_was_built_on_meta(swaps, operations, seed):
    operations = [Operation("parameter"), *operations]
    original, writer, reader = build(operations, "cpu", seed), build(operations, "cpu", seed), build(operations, "meta")
    memory = Memory(HostDriver(), MIB)
    before = tensors.SWAPS_STORAGES
    try:
        tensors.SWAPS_STORAGES = swaps and before
        identities = [id(getter()) for getter in writer.getters]
        arena = memory.writable()
        manifest = publish(writer.root, arena, device=CPU)
        assert state(writer) == state(original)
        assert structure(writer) == structure(original)
        assert [id(getter()) for getter in writer.getters] == identities
        attached = memory.read_only(arena)
        materialise(reader.root, manifest, attached, device=CPU)
        assert state(reader) == state(original)
        assert structure(reader) == structure(original)
        assert [name for name, _ in reader.root.state_dict().items()] == [name for name, _ in original.root.state_dict().items()]
        for builder, home in ((writer, arena), (reader, attached)):
            for parameter in builder.root.parameters():
                assert parameter.numel() == 0 or home.contains(parameter.data_ptr(), 1)
        # A module that came out of an arena can be published again, and installed over content that is there.
        again = publish(reader.root, memory.writable(), device=CPU) if not swaps else manifest
        materialise(writer.root, again, memory.arenas[-1] if not swaps else attached, device=CPU)
        assert state(writer) == state(original)
        assert structure(writer) == structure(original)
        for mapped in memory.arenas:  # not after a failure: pytest looks at the tensors
            mapped.close()
    finally:
        memory.driver.close()
        tensors.SWAPS_STORAGES = before


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("gain", torch.full((1,), 0.5), persistent=False)

    def forward(self, x):
        return x + self.gain * self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied embeddings, a shared block, a table that is rotated, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.blocks.append(self.blocks[0])
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.rand(8, 16).t())
        self.scales = [torch.rand(16), {"shift": torch.rand(16)}]

    def forward(self, tokens):
        x = self.embed(tokens) + self.table.t()[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x) * self.scales[0] + self.scales[1]["shift"]
        return self.head(x)


def on_meta(make):
    with torch.device("meta"):
        return make()


def test_outputs_are_equal_when_a_model_is_attached(memory):
    torch.manual_seed(0)
    model, tokens = Model(), torch.arange(8)
    expected = model(tokens)
    arena = memory.writable()
    reports = []
    manifest = publish(model, arena, device=CPU, on_report=reports.append)
    assert torch.equal(model(tokens), expected)
    twin = on_meta(Model)
    report = materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert torch.equal(twin(tokens), expected)
    assert twin.head.weight is twin.embed.weight
    shared = total(model.parameters())
    private = total([model.table, *model.scales[:1], model.scales[1]["shift"], *(block.gain for block in model.blocks[:3])])
    assert (report.shared_bytes, report.private_bytes, report.copied_bytes) == (shared, private, private)
    assert reports[0].copied_bytes == shared + private
    assert reports[0].tensors == report.tensors == len(list(model.parameters())) + 6


def test_arena_is_as_long_as_it_needs_to_be_when_a_model_was_published(memory):
    model = nn.Linear(1000, 300)
    arena = memory.writable()
    publish(model, arena, device=CPU)
    assert total(model.parameters()) <= arena.used <= total(model.parameters()) + 1024
    assert arena.length - arena.used < memory.driver.granularity + 512


def test_nothing_is_copied_when_a_module_lies_in_the_arena_already(memory):
    model, arena, reports = Model(), memory.writable(), []
    publish(model, arena, device=CPU)
    used = arena.used
    publish(model, arena, device=CPU, on_report=reports.append)
    assert reports[0].in_place_bytes == reports[0].shared_bytes == total(model.parameters())
    assert arena.used < used + 16 * 512


@pytest.mark.parametrize("swaps", [True, False])
def test_buffer_in_the_arena_becomes_private_when_it_is_published(memory, swaps, monkeypatch):
    monkeypatch.setattr(tensors, "SWAPS_STORAGES", swaps and tensors.SWAPS_STORAGES)
    arena = memory.writable()
    place = tensors.storage_at(arena.base + arena.allocate(64), 64, CPU)
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2))
    buffer = tensors.tensor_on(place, torch.float32, 0, (8,), (1,)).fill_(3.0)
    module.register_buffer("state", buffer)
    module.window = buffer[2:5]
    manifest = publish(module, arena, device=CPU)
    assert module.state is buffer
    assert not arena.contains(buffer.data_ptr())
    module.state.fill_(4.0)
    assert module.window.tolist() == [4.0] * 3
    twin = nn.Module()
    twin.weight = nn.Parameter(torch.empty(2, device="meta"))
    twin.register_buffer("state", torch.empty(8, device="meta"))
    twin.window = None
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert twin.state.tolist() == [3.0] * 8
    twin.state.fill_(5.0)
    assert twin.window.tolist() == [5.0] * 3


def test_unseen_view_follows_when_storages_can_be_swapped(memory):
    if not tensors.SWAPS_STORAGES:
        assert not hasattr(torch.UntypedStorage, "_swap_data_ptr_")
        return
    module = nn.Linear(4, 4)
    view = module.weight.detach()[1]
    module.compute = lambda: view
    arena = memory.writable()
    publish(module, arena, device=CPU)
    assert arena.contains(module.compute().data_ptr())


def test_storages_over_the_same_memory_stay_so_when_they_overlap(memory):
    source = torch.arange(32, dtype=torch.float32)
    module = nn.Module()
    module.left = nn.Parameter(torch.from_dlpack(source[:20]))
    module.register_buffer("right", tensors.tensor_on(tensors.storage_at(source.data_ptr() + 64, 64, CPU), torch.float32, 0, (16,), (1,)))
    arena = memory.writable()
    manifest = publish(module, arena, device=CPU)
    assert module.right.data_ptr() == module.left.data_ptr() + 64
    twin = nn.Module()
    twin.left = nn.Parameter(torch.empty(20, device="meta"))
    twin.register_buffer("right", torch.empty(16, device="meta"))
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert twin.right.tolist() == source[16:].tolist()
    assert twin.right.data_ptr() == twin.left.data_ptr() + 64


def test_writer_can_train_on_when_only_private_buffers_change(memory):
    model = nn.BatchNorm1d(4)
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    model(torch.rand(8, 4))
    twin = on_meta(lambda: nn.BatchNorm1d(4))
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    twin(torch.rand(8, 4))
    assert twin.running_mean.tolist() != [0.0] * 4
    assert int(model.num_batches_tracked) == 1 == int(twin.num_batches_tracked)


def test_private_memory_stays_where_it_is_when_the_reader_has_it_already(memory):
    model = nn.BatchNorm1d(4)
    model.running_mean.fill_(7.0)
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    twin = on_meta(lambda: nn.BatchNorm1d(4))
    twin.running_mean = torch.zeros(4)
    known_elsewhere = twin.running_mean.view(2, 2)
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert known_elsewhere.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_whoever_holds_a_parameter_sees_its_content_when_the_module_is_materialised(memory):
    def make():
        module = nn.Module()
        module.weight = PackedParameter(torch.rand(3, 3), dimension=1)
        return module

    model, arena = make(), memory.writable()
    manifest = publish(model, arena, device=CPU)
    twin = on_meta(make)
    held = twin.weight
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert held is twin.weight
    assert type(held) is PackedParameter
    assert held.dimension == 1
    assert held.weight_loader.__self__ is held
    assert torch.equal(held, model.weight)


def test_processed_parameters_are_taken_over_when_changes_are_allowed(memory):
    model = nn.Linear(3, 5)
    model.weight = nn.Parameter(model.weight.detach().t().to(torch.float8_e4m3fn), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(1))
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    twin = on_meta(lambda: nn.Linear(3, 5))
    attached = memory.read_only(arena)
    materialise(twin, manifest, attached, device=CPU, allow_changes=True)
    assert content(twin.weight) == content(model.weight)
    assert twin.weight.stride() == model.weight.stride()
    assert attached.contains(twin.scale.data_ptr())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_engine_may_build_slots_itself_when_it_names_them(memory):
    model = nn.Linear(3, 5)
    model.kernel = {"scale": torch.rand(5), "weight": model.weight}
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    twin = on_meta(lambda: nn.Linear(3, 5))
    twin.leftover = nn.Parameter(torch.empty(2, device="meta"))
    materialise(twin, manifest, memory.read_only(arena), device=CPU, rebuilt=lambda slot: str(slot).startswith(("kernel", "leftover")))
    assert torch.equal(twin.weight, model.weight)
    twin.leftover = None
    check_no_meta(twin)


def test_reader_can_untie_when_the_writer_did(memory):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    model.b.weight = nn.Parameter(torch.rand(2, 2))
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    twin = on_meta(Tied)
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert torch.equal(twin.a.weight, model.a.weight)
    assert torch.equal(twin.b.weight, model.b.weight)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_ties_and_views_come_back_when_the_reader_has_none(memory, device):
    def make():
        module = nn.Module()
        module.a, module.b = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        module.register_buffer("c", torch.rand(2))
        module.d = {"scale": torch.rand(2), "pair": (torch.rand(2), torch.rand(4))}
        return module

    model, arena = make(), memory.writable()
    model.b = model.a
    model.register_buffer("c", model.a.detach()[1:3])
    model.d["scale"] = model.c
    model.d["pair"] = (model.d["pair"][1][2:], model.d["pair"][1])
    manifest = publish(model, arena, device=CPU)
    with torch.device(device):
        twin = make()
    materialise(twin, manifest, memory.read_only(arena), device=CPU)
    assert twin.a is twin.b
    assert twin.c is twin.d["scale"]
    assert twin.c.data_ptr() == twin.a.data_ptr() + 4
    twin.d["pair"][1].zero_()
    assert twin.d["pair"][0].tolist() == [0.0, 0.0]
    assert torch.equal(twin.c, model.c)


def test_private_tensors_are_apart_when_only_the_reader_has_them_on_one_memory(memory):
    def make(together):
        module, content = nn.Linear(2, 2), torch.tensor([1.0, 2.0, 3.0, 4.0])
        module.register_buffer("low", content[:3])
        module.register_buffer("high", content[1:] if together else content[1:] * 10)
        return module

    model, twin, arena = make(together=False), make(together=True), memory.writable()
    materialise(twin, publish(model, arena, device=CPU), memory.read_only(arena), device=CPU)
    assert twin.low.tolist() == [1.0, 2.0, 3.0]
    assert twin.high.tolist() == [20.0, 30.0, 40.0]


def test_copy_of_a_module_is_private_when_it_was_made_from_an_attached_one(memory):
    model, arena = nn.Linear(2, 2), memory.writable()
    manifest = publish(model, arena, device=CPU)
    twin = on_meta(lambda: nn.Linear(2, 2))
    attached = memory.read_only(arena)
    materialise(twin, manifest, attached, device=CPU)
    other = copy.deepcopy(twin)
    with torch.no_grad():
        other.weight.zero_()
    assert attached.contains(twin.weight.data_ptr())
    assert torch.equal(twin.weight, model.weight)


WRITE = """
import torch
from gms_core.pytorch import materialise, publish
from gms_core.vmm.host import HostDriver
from tests.unit.pytorch.arenas import MIB, Memory

memory = Memory(HostDriver(), MIB)
model, arena = torch.nn.Linear(4, 4), memory.writable()
manifest = publish(model, arena, device=torch.device("cpu"))
with torch.device("meta"):
    twin = torch.nn.Linear(4, 4)
materialise(twin, manifest, memory.read_only(arena), device=torch.device("cpu"))
print(twin.weight.sum().isfinite().item(), flush=True)
with torch.no_grad():
    twin.weight.zero_()
print("written", flush=True)
"""


def test_process_dies_when_it_writes_to_a_shared_parameter():
    child = subprocess.run([sys.executable, "-c", WRITE], capture_output=True, text=True)
    assert child.stdout.split() == ["True"], child.stderr
    assert child.returncode == -signal.SIGSEGV
