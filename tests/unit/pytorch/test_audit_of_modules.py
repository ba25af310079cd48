"""Audits of what PyTorch has published: sizes of dtypes, and names of tied tensors, views and buffers."""

from __future__ import annotations

import torch

from gms_core.audit.places import Places, tensors_of
from gms_core.pytorch import publish
from gms_core.tensor_manifest import element_bytes
from tests.unit.pytorch.arenas import Memory


class Tied(torch.nn.Module):
    """Two names of one parameter, a view of it, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)
        self.head = torch.nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.first_rows = self.embed.weight.detach()[:4]
        self.register_buffer("scale", torch.ones(8))


def test_width_of_an_element_is_what_pytorch_says_when_its_dtype_is_known_by_name_alone() -> None:
    dtypes = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype) and str(kind) == f"torch.{name}"}
    assert len(dtypes) > 15
    assert {name: element_bytes(name) for name in dtypes} == {name: kind.itemsize for name, kind in dtypes.items()}


def test_all_names_of_a_tensor_are_found_by_its_bytes_when_a_module_was_published(memory: Memory) -> None:
    module, arena = Tied(), memory.writable()
    places = Places(tensors_of(publish(module, arena, device=torch.device("cpu"))))
    tied = module.embed.weight.data_ptr() - arena.base
    assert {one.names for one in places.at(tied, tied + 1)} == {("embed.weight", "head.weight"), ("first_rows",)}
    last = tied + 64 * 32 * 4 - 1
    (one,) = places.at(last, last + 1)
    assert (one.names, one.offset, one.size, one.dtype, one.shape, one.shared) == (
        ("embed.weight", "head.weight"),
        tied,
        64 * 32 * 4,
        "float32",
        (64, 32),
        True,
    )
    (private,) = [one for one in places.tensors if not one.shared]
    assert private.names == ("scale",)
    assert memory.driver.read(arena.address(private.offset), private.size) == module.scale.numpy().tobytes()
