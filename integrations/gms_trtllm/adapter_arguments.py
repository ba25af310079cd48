"""The options of a TensorRT-LLM that has no `LoadFormat.GMS`, with what later versions have: the load format, and the block ``gms_config``.

For TensorRT-LLM itself the load format is AUTO, which every version knows. That GMS was asked for is remembered beside it, goes with copies and
pickles, and is in what is dumped: nothing can make another object of the same options and lose it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_serializer, model_validator
from pydantic_core.core_schema import SerializationInfo, SerializerFunctionWrapHandler
from tensorrt_llm.llmapi.llm_args import LoadFormat, TorchLlmArgs

from gms_core.engine_log import log
from gms_trtllm.arguments import expect_if_asked, prepare_rank, with_settings

_NAME = "GMS"
_NUMBER = 3
"""Of the load format in versions that have it."""


class GmsConfig(BaseModel):
    """What TensorRT-LLM's users can say to GMS, as later versions take it.

    Attributes:
        socket_path: Of the device's server; None finds it. See `gms_trtllm.place.named_socket`.
        mode: ``auto`` publishes if nothing is published and attaches if something is; ``rw`` always publishes; ``ro`` only ever attaches.
        tag: Name of the pool.
    """

    model_config = ConfigDict(extra="forbid")

    socket_path: str | None = None
    mode: Literal["auto", "rw", "ro"] = "auto"
    tag: str = "weights"

    @model_validator(mode="after")
    def _has_a_tag(self) -> Self:
        if not self.tag.strip():
            raise ValueError("gms_config.tag must be a non-empty string")
        return self


class GmsTorchLlmArgs(TorchLlmArgs):  # type: ignore[misc]
    """The same options, and GMS's. With ``load_format="GMS"`` a process that has them is ready to load through GMS."""

    gms_config: GmsConfig = Field(default_factory=GmsConfig)
    _shares_weights: bool = PrivateAttr(default=False)

    @property
    def shares_weights(self) -> bool:
        """Whether the load format that was asked for is GMS."""
        return self._shares_weights

    @model_validator(mode="wrap")
    @classmethod
    def _take_load_format(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        asked = isinstance(data, dict) and _is_gms(data.get("load_format"))
        made = handler({**data, "load_format": LoadFormat.AUTO} if asked else data)
        if asked:
            made._shares_weights = True  # noqa: SLF001 - its own
            _check_experts(made)
            expect_if_asked(made)
        elif isinstance(data, dict) and made.gms_config != GmsConfig():
            log().warning("gms_config is set, and has no effect: load_format is not GMS")
        return made

    @model_serializer(mode="wrap")
    def _dump_load_format(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        dumped = handler(self)
        wanted = (info.include is None or "load_format" in info.include) and (info.exclude is None or "load_format" not in info.exclude)
        return {**dumped, "load_format": _NAME} if self._shares_weights and wanted else dumped

    def __getstate__(self) -> dict[Any, Any]:
        return with_settings(super().__getstate__())

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """In a rank, or in a copy."""
        super().__setstate__(state)
        prepare_rank(self, state)


def _is_gms(load_format: object) -> bool:
    if isinstance(load_format, str):
        return load_format.upper() == _NAME
    return type(load_format) is int and load_format == _NUMBER and _NUMBER not in {one.value for one in LoadFormat}


def _check_experts(args: TorchLlmArgs) -> None:
    """Refuse experts that move: their weights are written to while the engine runs."""
    experts = getattr(args, "moe_config", None)
    if getattr(experts, "load_balancer", None) is not None:
        raise ValueError("LoadFormat.GMS cannot go with moe_config.load_balancer")
    rebalance = getattr(experts, "rebalance", None)
    if rebalance is not None and getattr(rebalance, "enabled", True) and getattr(rebalance, "helper_slots_per_rank", 0) > 0:
        raise ValueError("LoadFormat.GMS cannot go with an active moe_config.rebalance")
