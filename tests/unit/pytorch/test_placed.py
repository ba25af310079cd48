"""Raw buffers that lie where the caller says."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import pytest
import torch

from gms_core.pytorch import placed

CPU = torch.device("cpu")
SIZE = 1 << 16


class Area:
    """Memory that is full of one byte, and what was asked of it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.memory.write(b"\x5a" * SIZE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.asked: list[int] = []

    def place(self, size: int) -> int | None:
        self.asked.append(size)
        return self.base


@pytest.fixture
def area() -> Area:
    return Area()


RAW: list[Callable[[], torch.Tensor]] = [
    lambda: torch.zeros(100, dtype=torch.int8),
    lambda: torch.zeros((100,), dtype=torch.uint8, device="cpu"),
    lambda: torch.zeros(size=[100], dtype=torch.int8, device=CPU, requires_grad=False),
    lambda: torch.empty(torch.Size([100]), dtype=torch.int8, device=None),
    lambda: torch.full((100,), 0, dtype=torch.int8),
    lambda: torch.full(size=(100,), fill_value=0, dtype=torch.uint8, pin_memory=False),
]


@pytest.mark.parametrize("make", RAW)
@pytest.mark.parametrize("default", [None, "inside", "outside"])
def test_raw_buffer_lies_at_the_given_address_when_it_is_made(area, make, default):
    if default == "outside":
        with torch.device("cpu"), placed(area.place, CPU):
            made = make()
    elif default == "inside":
        with placed(area.place, CPU), torch.device("cpu"):
            made = make()
    else:
        with placed(area.place, CPU):
            made = make()
    assert area.asked == [100]
    assert made.data_ptr() == area.base
    assert (made.shape, made.dtype in (torch.int8, torch.uint8), made.untyped_storage().nbytes()) == ((100,), True, 100)
    assert made.eq(0x5A).all()
    made.view(torch.float16).fill_(0)
    assert area.memory[:101] == b"\0" * 100 + b"\x5a"


OTHERS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.zeros(100),
    lambda: torch.zeros(100, dtype=torch.int32),
    lambda: torch.zeros(10, 10, dtype=torch.int8),
    lambda: torch.zeros((10, 10), dtype=torch.int8),
    lambda: torch.zeros((), dtype=torch.int8),
    lambda: torch.zeros(0, dtype=torch.int8),
    lambda: torch.ones(100, dtype=torch.int8),
    lambda: torch.full((100,), 3, dtype=torch.int8),
    lambda: torch.zeros(100, dtype=torch.int8, device="meta"),
    lambda: torch.zeros(100, dtype=torch.int8, out=torch.ones(100, dtype=torch.int8)),
    lambda: torch.zeros_like(torch.zeros(100, dtype=torch.int32), dtype=torch.int8),
]


@pytest.mark.parametrize("make", OTHERS)
def test_tensor_is_pytorchs_own_when_it_is_no_raw_buffer(area, make):
    with placed(area.place, CPU):
        made = make()
    assert area.asked == []
    expected = make()
    assert (made.shape, made.dtype, made.device) == (expected.shape, expected.dtype, expected.device)
    assert made.is_meta or torch.equal(made, expected)


def test_tensor_is_pytorchs_own_when_no_address_is_given():
    asked: list[int] = []
    with placed(asked.append, CPU):  # appending returns None
        made = torch.zeros(64, dtype=torch.int8)
    assert asked == [64]
    assert made.eq(0).all()


def test_other_devices_are_untouched_when_the_default_device_is_another(area):
    with placed(area.place, CPU), torch.device("meta"):
        assert torch.zeros(10, dtype=torch.int8).is_meta
    with torch.device("meta"), placed(area.place, CPU):
        assert torch.zeros(10, dtype=torch.int8).is_meta
        assert not torch.zeros(10, dtype=torch.int8, device="cpu").is_meta
    assert area.asked == [10]


def test_placing_ends_when_the_context_does(area):
    with pytest.raises(KeyError), placed(area.place, CPU):
        raise KeyError("for the test")
    torch.zeros(10, dtype=torch.int8)
    assert area.asked == []


def test_error_of_the_caller_passes_when_it_has_no_place():
    def refuse(size: int) -> int | None:
        raise MemoryError(f"no place for {size}")

    with placed(refuse, CPU), pytest.raises(MemoryError, match="no place for 10"):
        torch.zeros(10, dtype=torch.int8)


ANY: list[tuple[Callable[[], torch.Tensor], int]] = [
    (lambda: torch.zeros((10, 2, 8), dtype=torch.bfloat16, device="cpu"), 320),
    (lambda: torch.zeros(3, 5, dtype=torch.int32), 60),
    (lambda: torch.empty(torch.Size([7])), 28),
    (lambda: torch.empty((4, 4), memory_format=torch.contiguous_format), 64),
    (lambda: torch.full((2, 3), 0, dtype=torch.int64), 48),
    (lambda: torch.zeros(()), 4),
    (lambda: torch.zeros(100, dtype=torch.int8), 100),
]


@pytest.mark.parametrize(("make", "size"), ANY)
def test_any_tensor_lies_at_the_given_address_when_not_only_raw_buffers_are_meant(area, make, size):
    with placed(area.place, CPU, raw_only=False):
        made = make()
    expected = make()
    assert area.asked == [size]
    assert made.data_ptr() == area.base
    assert (made.shape, made.dtype, made.stride()) == (expected.shape, expected.dtype, expected.stride())
    made.zero_()
    assert area.memory[: size + 1] == b"\0" * size + b"\x5a"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(4),
        lambda: torch.full((4,), -1, dtype=torch.int32),
        lambda: torch.full((4,), 0),  # whose type is that of the value
        lambda: torch.arange(4),
        lambda: torch.zeros((0, 4)),
        lambda: torch.empty((1, 2, 3, 4), memory_format=torch.channels_last),
        lambda: torch.zeros(4, requires_grad=True),
    ],
)
def test_tensor_is_pytorchs_own_when_it_is_not_zero_or_not_plain(area, make):
    with placed(area.place, CPU, raw_only=False):
        made = make()
    assert area.asked == []
    assert made.stride() == make().stride()
