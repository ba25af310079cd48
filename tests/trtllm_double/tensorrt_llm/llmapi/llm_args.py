"""The options of an engine."""

from enum import Enum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from tensorrt_llm._double import HAS_GMS, HAS_STAGED_HOOKS
from tensorrt_llm.logger import logger


class LoadFormat(Enum):
    AUTO = 0
    DUMMY = 1
    VISION_ONLY = 2
    if HAS_GMS:
        GMS = 3


class StrictBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class MoeLoadBalancerConfig(StrictBaseModel):
    enabled: bool = True
    helper_slots_per_rank: int = 0


class MoeConfig(StrictBaseModel):
    backend: str = "CUTLASS"
    load_balancer: object | None = None
    rebalance: MoeLoadBalancerConfig | None = None


class SleepConfig(StrictBaseModel):
    pass


class KvCacheConfig(StrictBaseModel):
    dtype: str = "auto"
    free_gpu_memory_fraction: float = 0.9
    max_tokens: int | None = None
    max_gpu_total_bytes: int | None = None
    enable_block_reuse: bool = True
    use_kv_cache_manager_v2: bool | Literal["auto"] = "auto"


class SpeculativeConfig(StrictBaseModel):
    """A draft model, which has an engine of its own, or lies in the target as a part of it."""

    speculative_model: str | None = None
    in_target: bool = False
    load_format: str | None = None


class BaseLlmArgs(StrictBaseModel):
    model: str
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    load_format: str | LoadFormat = LoadFormat.AUTO
    checkpoint_format: str = "HF"
    checkpoint_loader: object | None = None
    moe_config: MoeConfig = Field(default_factory=MoeConfig)
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    sleep_config: SleepConfig | None = None
    speculative_config: SpeculativeConfig | None = None
    max_batch_size: int = 8

    @field_validator("load_format", mode="before")
    @classmethod
    def convert_load_format(cls, value):
        if isinstance(value, LoadFormat):
            return value
        if isinstance(value, bool):  # True is 1, and 1 is a format
            raise ValueError(f"Invalid LoadFormat: {value!r}")
        if isinstance(value, int):
            return LoadFormat(value)
        if isinstance(value, str) and value.upper() in LoadFormat.__members__:
            return LoadFormat[value.upper()]
        raise ValueError(f"Invalid LoadFormat: {value!r}")


if HAS_GMS:

    class GmsConfig(StrictBaseModel):
        socket_path: str | None = Field(default=None, json_schema_extra={"status": "prototype"})
        mode: Literal["auto", "rw", "ro"] = Field(default="auto", json_schema_extra={"status": "prototype"})
        tag: str = Field(default="weights", json_schema_extra={"status": "prototype"})

        @model_validator(mode="after")
        def _tag_is_not_blank(self):
            if not self.tag.strip():
                raise ValueError("gms_config.tag must be a non-empty string")
            return self

    class TorchLlmArgs(BaseLlmArgs):
        gms_config: GmsConfig = Field(default_factory=GmsConfig)

        @model_validator(mode="after")
        def validate_gms_config(self):
            if self.load_format != LoadFormat.GMS and self.gms_config != GmsConfig():
                logger.warning("gms_config is set, and has no effect: load_format is %s, not GMS", self.load_format.name)
            return self

        @model_validator(mode="after")
        def validate_gms_moe_compat(self):
            if self.load_format == LoadFormat.GMS and self.moe_config.load_balancer is not None and not HAS_STAGED_HOOKS:
                raise ValueError("LoadFormat.GMS cannot go with moe_config.load_balancer")
            rebalance = self.moe_config.rebalance
            if self.load_format == LoadFormat.GMS and rebalance is not None and rebalance.enabled and rebalance.helper_slots_per_rank > 0:
                raise ValueError("LoadFormat.GMS cannot go with an active moe_config.rebalance")
            return self
else:

    class TorchLlmArgs(BaseLlmArgs):
        pass
