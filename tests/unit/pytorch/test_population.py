"""Parameters into which nothing was loaded."""

from __future__ import annotations

import threading

import pytest
import torch

from gms_core.errors import UnpopulatedModule
from gms_core.pytorch.population import check_populated, marking

CPU = torch.device("cpu")


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.empty(4, 6, dtype=dtype), requires_grad=False)
        self.second = torch.nn.Parameter(torch.empty_like(self.first.data), requires_grad=False)


def made(dtype: torch.dtype = torch.bfloat16) -> Model:
    with marking(CPU):
        return Model(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64])
def test_parameters_are_named_when_nothing_was_written_to_them(dtype: torch.dtype) -> None:
    model = made(dtype)
    model.first.copy_(torch.ones(4, 6))
    with pytest.raises(UnpopulatedModule, match="nothing was loaded into 1 of 2 parameters: second"):
        check_populated(model)
    writer = threading.Thread(target=model.second.fill_, args=(2,))  # loaders have threads
    writer.start()
    writer.join()
    check_populated(model)


def test_marks_are_found_when_a_parameter_was_transposed_or_is_a_view() -> None:
    model = made()
    model.first.data = model.first.data.t().contiguous()
    model.second.data = model.second.data[1:, 1:]
    with pytest.raises(UnpopulatedModule, match="first, second"):
        check_populated(model)


def test_model_passes_with_a_warning_when_rows_of_a_parameter_are_padding(caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    model.first[:3] = 1
    model.second[:] = 1
    check_populated(model)
    assert "nothing was loaded into rows of 1 parameters: first (25.0%); that is padding, or a part of the checkpoint is missing" in caplog.text


def test_nothing_is_said_when_columns_are_padding_or_rows_cannot_be_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    model.first[:, :5] = 1
    model.second.data = model.second.data.t()
    model.second[0] = 1
    check_populated(model)
    assert not caplog.text


def test_parameter_is_named_when_it_has_no_memory() -> None:
    with pytest.raises(UnpopulatedModule, match="first, second"), torch.device("meta"):
        check_populated(Model(torch.float32))


def test_nothing_is_marked_when_it_is_elsewhere_or_later() -> None:
    with marking(CPU):
        assert torch.empty(4, device="meta").is_meta
        assert torch.zeros(4).eq(0).all()
    model = Model(torch.float32)
    for parameter in model.parameters():
        parameter.data.zero_()
    check_populated(model)
