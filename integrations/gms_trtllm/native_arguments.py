"""The options of a TensorRT-LLM that has `LoadFormat.GMS`, in a class of GMS's own."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

from gms_trtllm.arguments import expect_if_asked, prepare_rank, with_settings


class GmsTorchLlmArgs(TorchLlmArgs):  # type: ignore[misc]
    """The same options. With ``load_format="GMS"`` a process that has them is ready to load through GMS."""

    @model_validator(mode="after")
    def _is_expected(self) -> Self:
        expect_if_asked(self)
        return self

    def __getstate__(self) -> dict[Any, Any]:
        return with_settings(super().__getstate__())

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """In a rank, or in a copy."""
        super().__setstate__(state)
        prepare_rank(self, state)
