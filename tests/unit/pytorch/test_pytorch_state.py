"""What loading has changed besides tensors comes to a module that nothing was loaded into."""

from __future__ import annotations

import collections
import enum
import os
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from gms_core.errors import ManifestError, UnpopulatedModule
from gms_core.pytorch import Remembered, publish, take_over
from gms_core.tensor_manifest import (
    Change,
    Items,
    Plain,
    Same,
    Slot,
    Step,
    Word,
    built_of,
    changes_of,
    encode,
    storages_of,
)
from tests.unit.pytorch.arenas import Memory

CPU = torch.device("cpu")


class Backend(enum.Enum):
    PLAIN = "plain"
    PACKED = "packed"


class Flags(enum.Flag):
    A = 1
    B = 2


class Fixed:
    __slots__ = ()


class Guarded:
    """Refuses what everybody but itself sets."""

    def __init__(self):
        vars(self)["mode"] = 1

    mode = property(lambda self: vars(self)["mode"])


class Sharded(nn.Linear):
    pass


class Method:
    def __init__(self):
        self.backend = Backend.PLAIN
        self.cache = {}
        self.seen = set()


class Other(Method):
    pass


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
        self.weight.loader = build
        self.register_buffer("cache", torch.zeros(3))
        self.work = [torch.zeros(2, dtype=torch.int64)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()
        self.head = nn.Linear(4, 2)
        self.head.weight.flags = ["a"]
        self.head.bias.kind = "bias"
        self.spare = SimpleNamespace(flag=False)
        self.helper = os.path
        self.fixed = Fixed()
        self.guarded = Guarded()


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
    vars(model.guarded)["mode"] = 2


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
    assert reader.guarded.mode == 2
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
        (lambda model: setattr(model, "again", model.helper), r"again \(a new builtins\.module\)"),
        (lambda model: setattr(model.layer.method, "mode", Flags.A | Flags.B), r"layer\.method\.mode \(several flags"),
        (lambda model: setattr(model.layer.method, "__class__", Other), r"layer\.method \(a Method that has become a Other\)"),
        (lambda model: setattr(model.head, "__class__", Sharded), r"head \(a Linear that has become a Sharded\)"),
        (lambda model: model.head.register_forward_pre_hook(lambda *_: None), r"head \(other hooks than before\)"),
        (lambda model: model.register_forward_hook(lambda *_: None), r"the module \(other hooks than before\)"),
        (lambda model: setattr(model.head.weight, "table", Method()), r"head\.weight\.table \(a new .*Method\)"),
        (lambda model: setattr(model.head.weight, "table", {"a": [Method()]}), r"head\.weight\.table \(a new .*Method\)"),
        (lambda model: model.head.weight.flags.append(Method()), r"head\.weight\.flags \(a new .*Method\)"),
        (lambda model: setattr(model.head.weight, "big", 2**80), r"head\.weight\.big \(a number of more than 64 bits\)"),
        (lambda model: setattr(model.head.weight, "scales", [torch.ones(1)]), r"head\.weight\.scales \(a new tensor\)"),
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


def other_shape(model):
    model.layer.weight = nn.Parameter(torch.empty(4, 8, device="meta"), requires_grad=False)


def other_classes(model):
    model.head.__class__ = type("ShardedLinear", (nn.Linear,), {})
    model.layer.method.__class__ = type("PackedMethod", (Method,), {})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_shape, r"layer\.weight is float32\[4, 4\] and here float32\[4, 8\]\."),
        (lambda model: model.head.half(), r"head\.bias is float32\[2\] and here float16\[2\], head\.weight is float32"),
        (lambda model: model.layer.register_buffer("cache", torch.empty(8, device="meta")), r"layer\.cache is float32\[3\] and here float32\[8\]"),
        (lambda model: setattr(model.layer, "work", [torch.empty(1)]), r"layer\.work\[0\] is int64\[2\] and here float32\[1\]"),
        (other_classes, r"head is torch.*\.Linear and here .*ShardedLinear, layer\.method is .*\.Method and here .*PackedMethod"),
        (lambda model: delattr(model, "spare"), r"spare is types\.SimpleNamespace and here not there"),
        (lambda model: setattr(model, "more", nn.Parameter(torch.empty(2))), r"more is not there and here float32\[2\]"),
    ],
)
def test_taking_over_is_refused_when_the_module_was_built_differently(memory: Memory, change, what: str) -> None:
    _, manifest, attached = published(memory)
    reader = build("meta")
    change(reader)
    with pytest.raises(ManifestError, match=what):
        take_over(reader, manifest, attached, device=CPU)


def test_module_taken_over_is_the_same_when_keys_and_containers_differ_that_hold_nothing(memory: Memory) -> None:
    _, manifest, attached = published(memory)
    reader = build("meta")
    reader.layer.limits = [1, 2]
    reader.layer.by_object = {object(): Method()}
    take_over(reader, manifest, attached, device=CPU)
    assert reader.layer.packed.is_shuffled is True


def test_manifest_says_nothing_of_the_module_when_it_is_published_without_it(memory: Memory) -> None:
    model = build("cpu")
    arena = memory.writable()
    manifest = publish(model, arena, device=CPU)
    assert (built_of(manifest), b"built" in manifest) == ({}, False)
    with pytest.raises(ManifestError, match="does not tell how its module was built"):
        take_over(build("meta"), manifest, memory.read_only(arena), device=CPU)


def test_taking_over_is_refused_when_a_parameter_would_have_no_content(memory: Memory) -> None:
    _, manifest, attached = published(memory, ignore=lambda slot: str(slot) == "head.bias")
    with pytest.raises(UnpopulatedModule, match=r"head\.bias"):
        take_over(build("meta"), manifest, attached, device=CPU)


def test_attributes_are_gone_when_a_replaced_parameter_lacks_those_of_its_predecessor(memory: Memory) -> None:
    def renew(model):
        layer = model.layer
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        layer.weight.blocks = [1, 2]
        model.head.weight.flags.append("b")
        del model.head.bias.kind

    _, manifest, attached = published(memory, renew)
    reader = build("meta")
    take_over(reader, manifest, attached, device=CPU)
    assert not hasattr(reader.layer.weight, "output_dim")
    assert reader.layer.weight.blocks == [1, 2]
    assert reader.head.weight.flags == ["a", "b"]
    assert not hasattr(reader.head.bias, "kind")
    assert reader.layer.weight.loader is not None  # a function, which is of no use but to loaders


def test_communicators_are_left_alone_when_they_are_opaque(memory: Memory) -> None:
    class Communicator:
        def __init__(self):
            self.buffer = torch.empty(2)

    def with_communicator(device):
        model = build(device)
        with torch.device(device):
            model.layer.group = Communicator()
        return model

    writer = with_communicator("cpu")
    before = Remembered(writer, opaque=(Communicator,))
    load(writer)
    arena = memory.writable()
    manifest = publish(writer, arena, device=CPU, opaque=(Communicator,), before=before)
    reader = with_communicator("meta")
    take_over(reader, manifest, memory.read_only(arena), device=CPU, opaque=(Communicator,))
    assert reader.layer.group.buffer.is_meta


def tampered(manifest: bytes, *changes: Change) -> bytes:
    return encode(storages_of(manifest), changes, built_of(manifest))


def attribute(*names: str) -> tuple[Step, ...]:
    return tuple(Step("attribute", name) for name in names)


LAYER = (Step("module", "layer"),)
CONFIG = (*LAYER, Step("attribute", "config"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (Change((), Step("attribute", "spare"), Same(attribute("helper", "system"))), r"uses helper\.system"),
        (Change((), Step("attribute", "spare"), Same(attribute("helper"))), "uses helper"),
        (Change(attribute("helper"), Step("attribute", "sep"), Plain("x")), "changes or uses helper"),
        (Change((), Step("attribute", "spare"), Same((*LAYER, *attribute("weight", "loader")))), r"uses layer\.weight\.loader"),
        (Change((), Step("attribute", "_forward_hooks"), Items("dict", ())), "cannot become dict"),
        (Change((), Step("attribute", "__dict__"), Items("dict", ())), "cannot become dict"),
        (Change((), None, Items("dict", ())), "the module cannot become dict"),
        (Change(CONFIG, None, Items("list", (Plain(1),))), r"layer\.config cannot become list"),
        (Change(CONFIG, None, Items("dict", (Plain(1),))), "a dict cannot be made"),
        (Change(CONFIG, None, Items("dict", (Items("list", ()), Plain(1)))), "a dict cannot be made"),
        (Change(CONFIG, Step("attribute", "x"), Plain(1)), r"layer\.config\.x cannot become int"),
        (Change(LAYER, Step("item", "x"), Plain(1)), "cannot become int"),
        (Change(LAYER, Step("parameter", "weight"), Plain(1)), r"layer\.weight cannot become int"),
        (Change(LAYER, Step("module", "method"), Same((*LAYER, *attribute("method")))), r"layer\.method cannot become Method"),
        (Change(LAYER, Step("attribute", "x"), Word("device", "nowhere:7")), "nowhere:7, which is not known here"),
        (Change(LAYER, Step("attribute", "x"), Word("enum", f"{__name__}:published:x")), "which is not known here"),
        (Change(LAYER, Step("attribute", "x"), Word("enum", f"{__name__}:Backend:mro")), "which is not known here"),
        (Change(attribute("fixed"), Step("attribute", "x"), Plain(1)), "sets x, which a Fixed cannot have"),
    ],
)
def test_taking_over_is_refused_when_a_change_is_none_that_a_writer_makes(memory: Memory, change: Change, what: str) -> None:
    _, manifest, attached = published(memory)
    with pytest.raises(ManifestError, match=what):
        take_over(build("meta"), tampered(manifest, change), attached, device=CPU)


def test_taking_over_is_refused_when_a_tensor_belongs_to_what_no_writer_searches(memory: Memory) -> None:
    _, manifest, attached = published(memory)
    first, *rest = storages_of(manifest)
    tensor = first.tensors[0]
    astray = replace(first, tensors=(replace(tensor, slots=(*tensor.slots, Slot(attribute("helper", "altsep")))), *first.tensors[1:]))
    with pytest.raises(ManifestError, match=r"helper\.altsep"):
        take_over(build("meta"), encode((astray, *rest), changes_of(manifest), built_of(manifest)), attached, device=CPU)
    assert os.path.altsep is None


def test_taking_over_is_refused_when_a_member_is_not_known(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, attached = published(memory)
    reader = build("meta")
    monkeypatch.setitem(globals(), "Backend", None)
    with pytest.raises(ManifestError, match="Backend:PACKED, which is not known here"):
        take_over(reader, manifest, attached, device=CPU)
