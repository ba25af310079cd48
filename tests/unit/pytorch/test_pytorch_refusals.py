"""What is refused, with names, and leaves module and arena as they were."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gms_core.errors import DriverUnavailable, GmsError, ManifestError, OutOfMemory, UnpopulatedModule
from gms_core.pytorch import capture, check_no_meta, materialise, publish
from gms_core.pytorch.cuda_pool import ArenaPool
from gms_core.pytorch.discover import discover
from gms_core.pytorch.manifest import decode
from gms_core.vmm.host import HostDriver
from tests.unit.pytorch.arenas import MIB, Memory

CPU = torch.device("cpu")


def on_meta(make):
    with torch.device("meta"):
        return make()


def pair():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def published(memory, model):
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    return manifest, memory.read_only(arena)


def with_attribute(value):
    module = nn.Linear(2, 2)
    module.extra = value
    return module


def test_names_are_listed_when_tensors_are_on_meta(memory):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    for layer in list(model)[1:]:
        layer.to("meta")
    arena = memory.writable()
    with pytest.raises(UnpopulatedModule, match=r"58 tensors have no content: 1\.bias, 1\.weight, 10\.bias.* and 38 more"):
        publish(model, arena, device=CPU)
    assert arena.used == 0


def test_lazy_and_freed_tensors_are_refused_when_published(memory):
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    model[1].weight.untyped_storage().resize_(0)
    with pytest.raises(UnpopulatedModule, match=r"3 tensors have no content: 0\.bias, 0\.weight, 1\.weight"):
        publish(model, memory.writable(), device=CPU)


def test_module_without_tensors_is_refused_when_published(memory):
    with pytest.raises(UnpopulatedModule, match="has no tensors"):
        publish(nn.Sequential(nn.ReLU()), memory.writable(), device=CPU)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.rand(3, 3).to_sparse(), r"extra has the layout sparse_coo"),
        (lambda: torch.rand(3, 3).to_mkldnn(), r"extra has the layout _mkldnn"),
        (lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8), r"extra is of one of PyTorch's quantised types"),
        (lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), r"extra is a nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged), r"extra is a NestedTensor, which wraps"),
        (lambda: torch.rand(3, dtype=torch.complex64).conj(), r"extra is a lazy conjugate"),
    ],
    ids=["sparse", "mkldnn", "quantised", "nested", "wrapper", "conjugate"],
)
def test_odd_tensor_is_named_and_can_be_left_out_when_published(memory, make, reason):
    model = with_attribute(make())
    before = model.weight.data_ptr()
    with pytest.raises(ManifestError, match=reason) as caught:
        publish(model, memory.writable(), device=CPU)
    assert "ignore=" in caught.value.hint
    assert model.weight.data_ptr() == before
    arena = memory.writable()
    publish(model, arena, device=CPU, ignore=lambda slot: str(slot).startswith("extra"))
    assert arena.contains(model.weight.data_ptr())


def test_overlap_is_refused_when_elements_do_not_line_up(memory):
    source = torch.zeros(16)
    odd = torch.frombuffer(source.numpy(), dtype=torch.uint8)
    publish(with_attribute([torch.from_dlpack(odd[2:40]), source]), memory.writable(), device=CPU)
    shifted = torch.frombuffer(memoryview(source.numpy()).cast("B")[2:34], dtype=torch.float32)
    with pytest.raises(ManifestError, match=r"extra\[0\] overlaps another storage at a distance of 2 bytes"):
        publish(with_attribute([shifted, source]), memory.writable(), device=CPU)


def test_module_is_as_it_was_when_the_arena_cannot_grow(memory):
    model = pair()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    arena = memory.writable()
    memory.refuse = True
    with pytest.raises(OutOfMemory, match="says the test"):
        publish(model, arena, device=CPU)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_objects_are_not_searched_when_they_are_opaque(memory):
    class Communicator:
        def __init__(self) -> None:
            self.workspace = torch.rand(3)

    model = with_attribute(Communicator())
    model.partial = functools.partial(torch.add, torch.rand(3))
    model.lock = threading.Lock()
    model.room = types.SimpleNamespace(scale=torch.rand(3))
    assert [found.name for found in discover(model)] == ["weight", "bias", "extra.workspace", "room.scale"]
    assert [found.name for found in discover(model, opaque=(Communicator,))] == ["weight", "bias", "room.scale"]


def test_missing_slots_are_named_when_the_reader_lacks_them(memory):
    model = with_attribute({"a": torch.rand(2), 5: [torch.rand(2)], (1, "x"): torch.rand(2)})
    model.norm = nn.LayerNorm(2)
    manifest, arena = published(memory, model)
    twin = on_meta(lambda: with_attribute({"a": "text"}))
    missing = r"5 published slots have no place in this module: extra\['a'\] \(here a str\), extra\[\(1, 'x'\)\], extra\[5\]\[0\], norm\.bias, norm"
    with pytest.raises(ManifestError, match=missing):
        materialise(twin, manifest, arena, device=CPU)
    assert twin.weight.is_meta


def test_difference_is_named_when_shape_or_dtype_is_another(memory):
    manifest, arena = published(memory, nn.Linear(4, 6))
    for twin in (on_meta(lambda: nn.Linear(4, 6, dtype=torch.bfloat16)), on_meta(lambda: nn.Linear(4, 5))):
        with pytest.raises(ManifestError, match=r"2 published tensors differ from this module's: bias is float32\[6\] and here"):
            materialise(twin, manifest, arena, device=CPU)
        assert twin.weight.is_meta


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parameter_without_content_is_named_when_the_writer_had_none(memory, device):
    manifest, arena = published(memory, nn.Linear(4, 6))
    with torch.device(device):
        twin = nn.Linear(4, 6)
        twin.more = nn.Linear(2, 2)
    with pytest.raises(UnpopulatedModule, match=r"2 tensors would be left without content: more\.bias, more\.weight"):
        materialise(twin, manifest, arena, device=CPU)
    assert not arena.contains(twin.weight.data_ptr())


def test_leftovers_are_named_when_a_module_is_checked():
    model = nn.Linear(2, 2)
    check_no_meta(model)
    model.scales = [torch.empty(2, device="meta"), torch.empty(0, device="meta")]
    with pytest.raises(UnpopulatedModule, match=r"1 tensors would be left without content: scales\[0\]"):
        check_no_meta(model)
    check_no_meta(model, ignore=lambda slot: str(slot) == "scales[0]")


def test_manifest_is_refused_when_it_is_of_another_format(memory):
    manifest, arena = published(memory, nn.Linear(2, 2))
    content = msgspec.msgpack.decode(manifest)
    for data, expected in (
        (b"", "no tensor manifest"),
        (b"manifest", "no tensor manifest"),
        (msgspec.msgpack.encode({**content, "format": "gms-tensors/2"}), "'gms-tensors/2'.*publish again with this version"),
        (msgspec.msgpack.encode({**content, "more": 1}), "damaged"),
        (manifest[:-1], "no tensor manifest|damaged"),
    ):
        with pytest.raises(ManifestError, match=expected):
            materialise(on_meta(lambda: nn.Linear(2, 2)), data, arena, device=CPU)


@pytest.mark.parametrize(
    ("where", "change", "expected"),
    [
        ("storage", {"offset": 2**40}, "lies at 1099511627776"),
        ("storage", {"size": 2**40}, "weight lies at 0"),
        ("storage", {"size": 8}, "ends at byte 16 of a storage of 8 bytes"),
        ("storage", {"offset": -512}, "damaged"),
        ("storage", {"offset": 2}, "which float32 elements cannot"),
        ("storage", {"place": "cuda:1"}, "damaged"),
        ("tensor", {"offset": 1}, "ends at byte 20"),
        ("tensor", {"stride": [2**61, 1]}, "ends at byte"),
        ("tensor", {"stride": [-2, 1]}, "damaged"),
        ("tensor", {"stride": [1]}, "2 dimensions and 1 strides"),
        ("tensor", {"shape": [2**61, 0, 2**61], "stride": [1, 1, 1]}, "damaged|differ"),
        ("tensor", {"shape": [2.5, 1]}, "damaged"),
        ("tensor", {"dtype": "nn"}, "does not know"),
        ("tensor", {"dtype": "int32"}, "has none of"),
        ("tensor", {"slots": []}, "has no slot"),
        ("tensor", {"slots": [{"steps": [["module", "x"]], "persistent": True}]}, "has no slot"),
        ("tensor", {"slots": [{"steps": [["parameter", "bias"]], "persistent": True}]}, "bias has two tensors"),
        ("tensor", {"slots": [{"steps": [["call", "x"]], "persistent": True}]}, "damaged"),
    ],
)
def test_manifest_is_refused_when_it_is_damaged(memory, where, change, expected):
    manifest, arena = published(memory, nn.Linear(2, 2))
    content = msgspec.msgpack.decode(manifest)
    storage = content["storages"][0]
    (storage if where == "storage" else storage["tensors"][0]).update(change)
    twin = on_meta(lambda: nn.Linear(2, 2))
    with pytest.raises(ManifestError, match=expected):
        materialise(twin, msgspec.msgpack.encode(content), arena, device=CPU)
    assert twin.weight.is_meta
    assert twin.bias.is_meta


@given(st.data())
def test_no_tensor_lies_outside_the_arena_when_bytes_of_the_manifest_are_changed(data):
    memory = Memory(HostDriver(), MIB)
    try:
        manifest, arena = published(memory, pair())
        changed = bytearray(manifest)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        twin = on_meta(pair)
        try:
            materialise(twin, bytes(changed), arena, device=CPU)
        except GmsError:
            assert all(tensor.is_meta for tensor in twin.state_dict().values())
        else:
            for parameter in twin.parameters():
                reach = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True)) + 1
                assert arena.contains(parameter.data_ptr(), reach * parameter.element_size())
    finally:
        memory.close()


def test_refusal_says_what_to_install_when_pytorch_has_no_cuda(memory):
    with capture(memory.writable(), CPU):
        assert torch.rand(2).device == CPU
    if hasattr(torch._C, "_cuda_customAllocator"):
        return
    with pytest.raises(DriverUnavailable, match="built with CUDA"):
        ArenaPool(memory.writable(), torch.device("cuda", 0))


def test_slots_are_told_apart_when_a_dict_has_keys_of_many_types(memory):
    key = dataclasses.make_dataclass("Key", ["number"], frozen=True)(3)
    content = {1: torch.ones(1), "1": torch.zeros(1), (1,): torch.full((1,), 2.0), key: torch.full((1,), 3.0)}
    manifest, arena = published(memory, with_attribute(content))
    twin = on_meta(lambda: with_attribute({name: torch.empty(1) for name in content}))
    materialise(twin, manifest, arena, device=CPU)
    assert [str(slot) for storage in decode(manifest) for tensor in storage.tensors for slot in tensor.slots][2:] == [
        "extra[1]",
        "extra['1']",
        "extra[(1,)]",
        "extra[Key(number=3)]",
    ]
    assert twin.extra[1].item() == 1.0
    assert twin.extra["1"].item() == 0.0
    assert twin.extra[(1,)].item() == 2.0
    assert twin.extra[key].item() == 3.0
