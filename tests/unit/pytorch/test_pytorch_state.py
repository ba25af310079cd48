"""What loading has changed besides tensors comes to a module that nothing was loaded into."""

from __future__ import annotations

import collections
import enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gms_core.errors import ManifestError, UnpopulatedModule
from gms_core.pytorch import Remembered, publish, take_over
from gms_core.tensor_manifest import changes_of
from tests.unit.pytorch.arenas import Memory

CPU = torch.device("cpu")


class Backend(enum.Enum):
    PLAIN = "plain"
    PACKED = "packed"


class Method:
    def __init__(self):
        self.backend = Backend.PLAIN
        self.cache = {}
        self.seen = set()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.weight.output_dim = 0
        self.input_scale = nn.Parameter(torch.empty(1), requires_grad=False)
        self.bias_scale = nn.Parameter(torch.empty(1), requires_grad=False)
        self.method = Method()
        self.config = {"block": 128, "shape": [1, 2]}
        self.w_kc = None
        self.noted = self.weight.device
        self.stale = 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()
        self.head = nn.Linear(4, 2)
        self.spare = SimpleNamespace(flag=False)


def build(device):
    with torch.device(device):
        return Model()


def load(model):
    """As an engine does: fill, pack, leave flags, drop what is used up."""
    layer = model.layer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter) + 1)
    layer.packed = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)
    layer.packed.is_shuffled = True
    layer.weight.format_ue8m0 = False
    layer.w_kc, layer.w_vc = layer.weight.detach().clone(), layer.weight.detach().clone() * 2
    layer.pair = (layer.w_kc + 1, torch.ones(2))
    layer.by_name = {"head": model.head.weight, ("a", 1): 5}
    layer.shape, layer.dtype, layer.tile = torch.Size([2, 3]), torch.float8_e4m3fn, -1.5
    layer.again, layer.queue = layer.method, collections.deque([1, None])
    layer.input_scale = None
    del layer.bias_scale, layer.stale
    layer.method.backend = Backend.PACKED
    layer.method.cache["workspace"] = torch.full((3,), 7)
    layer.method.seen.add("w")
    layer.config["shape"].append(3)
    layer.config = dict(layer.config, block=64)
    model.spare.flag = True


def published(memory, change=load, **options):
    writer = build("cpu")
    before = Remembered(writer)
    change(writer)
    arena = memory.writable()
    return writer, publish(writer, arena, device=CPU, before=before, **options), memory.read_only(arena)


def test_module_is_as_if_it_was_loaded_when_it_takes_over(memory: Memory) -> None:
    writer, manifest, attached = published(memory)
    reader = build("meta")
    take_over(reader, manifest, attached, device=CPU)
    mine, theirs = reader.layer, writer.layer
    assert {name for name, _ in reader.named_parameters()} == {name for name, _ in writer.named_parameters()}
    assert all(torch.equal(value, dict(writer.named_parameters())[name]) for name, value in reader.named_parameters())
    assert mine.packed.is_shuffled is True
    assert (mine.weight.output_dim, mine.weight.format_ue8m0) == (0, False)
    assert mine.input_scale is None
    assert not hasattr(mine, "bias_scale")
    assert not hasattr(mine, "stale")
    assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in ("w_kc", "w_vc"))
    assert isinstance(mine.pair, tuple)
    assert all(map(torch.equal, mine.pair, theirs.pair))
    assert mine.by_name["head"] is reader.head.weight
    assert mine.by_name["a", 1] == 5
    assert (mine.shape, type(mine.shape), mine.dtype, mine.tile) == (torch.Size([2, 3]), torch.Size, torch.float8_e4m3fn, -1.5)
    assert mine.again is mine.method
    assert mine.queue == collections.deque([1, None])
    assert (mine.method.backend, mine.method.seen, mine.config) == (Backend.PACKED, {"w"}, {"block": 64, "shape": [1, 2, 3]})
    assert torch.equal(mine.method.cache["workspace"], torch.full((3,), 7))
    assert reader.spare.flag is True
    assert mine.noted == CPU


def test_nothing_is_told_when_loading_changes_only_tensors(memory: Memory) -> None:
    def fill(model):
        for parameter in model.parameters():
            parameter.data.fill_(3.0)

    _, manifest, attached = published(memory, fill)
    assert changes_of(manifest) == ()
    reader = build("meta")
    take_over(reader, manifest, attached, device=CPU)
    assert float(reader.head.weight.detach().sum()) == 24


def test_tensor_is_shared_when_it_is_named_as_a_weight(memory: Memory) -> None:
    def is_weight(slot):
        return slot.steps[-1].name == "w_kc"

    _, manifest, attached = published(memory, weights=is_weight)
    reader = build("meta")
    take_over(reader, manifest, attached, device=CPU)
    assert attached.contains(reader.layer.w_kc.data_ptr())
    assert not attached.contains(reader.layer.w_vc.data_ptr())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model: setattr(model.layer, "kernel", Method()), r"layer\.kernel \(a new .*Method\)"),
        (lambda model: setattr(model.layer, "forward", lambda x: x), r"layer\.forward \(a new builtins\.function\)"),
        (lambda model: setattr(model.layer.method, "big", 2**80), r"layer\.method\.big \(a number of more than 64 bits\)"),
        (lambda model: model.layer.config.update(own=model.layer.config["shape"], new=[[Method()]]), r"layer\.config \(a new .*Method\)"),
        (lambda model: setattr(model, "extra", nn.Linear(1, 1)), r"extra \(a new torch\.nn\.modules\.linear\.Linear\)"),
    ],
)
def test_publishing_is_refused_when_a_change_cannot_be_described(memory: Memory, change, what: str) -> None:
    with pytest.raises(ManifestError, match=what):
        published(memory, change)


def test_publishing_is_refused_when_tensors_are_in_a_container_that_is_in_two_places(memory: Memory) -> None:
    def change(model):
        model.layer.pair = model.head.pair = [torch.ones(1)]

    with pytest.raises(ManifestError, match="in two places"):
        published(memory, change)


def test_publishing_is_refused_when_a_container_contains_itself(memory: Memory) -> None:
    def change(model):
        model.layer.loop = [1]
        model.layer.loop.append(model.layer.loop)

    with pytest.raises(ManifestError, match="contains itself"):
        published(memory, change)


def test_publishing_is_refused_when_another_module_was_loaded(memory: Memory) -> None:
    with pytest.raises(ManifestError, match="not the one that was built"):
        publish(build("cpu"), memory.writable(), device=CPU, before=Remembered(build("cpu")))


def test_taking_over_is_refused_when_the_module_lacks_what_was_changed(memory: Memory) -> None:
    _, manifest, attached = published(memory)
    reader = build("meta")
    del reader.spare
    with pytest.raises(ManifestError, match="changes spare"):
        take_over(reader, manifest, attached, device=CPU)


def test_taking_over_is_refused_when_a_parameter_would_have_no_content(memory: Memory) -> None:
    _, manifest, attached = published(memory)
    reader = build("meta")
    reader.more = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(UnpopulatedModule, match="more"):
        take_over(reader, manifest, attached, device=CPU)


def test_taking_over_is_refused_when_a_member_is_not_known(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, attached = published(memory)
    reader = build("meta")
    monkeypatch.setitem(globals(), "Backend", None)
    with pytest.raises(ManifestError, match="Backend:PACKED, which is not known here"):
        take_over(reader, manifest, attached, device=CPU)
