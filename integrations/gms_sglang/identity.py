"""What decides whether weights that another engine has loaded are those that this one needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gms_core.config import engine_variables
from gms_core.layout import Identity
from gms_core.pytorch.device import device_name
from gms_core.weights.identity import DUMMY, digest_of, plain, whereabouts
from gms_patches.apply import installed_version
from gms_patches.for_sglang import DISTRIBUTIONS
from gms_sglang.arguments import argument
from gms_sglang.place import is_cpu

_NOT_OF_THE_LAYOUT = frozenset({"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", "quantization_config"})
"""Keys of a model's configuration that say where it came from, or that have a field of their own."""

_VARIABLE = re.compile(r"^(SGLANG|SGL)_")
_OF_NO_WEIGHT = re.compile(
    r"_(LOG|PORT|GRPC|HTTP|SOCKET|TIMEOUT|PLUGINS|PROFILE|PROFILER|TRACE|NVTX|OTLP|METRICS|COREDUMP|TEST|SCHEDULER|GRAMMAR|OUTLINES|HICACHE"
    r"|DISAGGREGATION|SECRET|PASSWORD)(_|$)|_CACHE_DIR$|_API_KEY$|^SGLANG_(RUN_ID|DP_RANK|IS_FIRST_RANK_ON_NODE|ENABLE_TP_MEMORY_INBALANCE_CHECK)$"
)
"""Environment variables of SGLang that say how it logs, listens, schedules and caches, or which process this is. Any other may choose kernels, or how
weights are divided, and with them the layout of weights."""

KERNELS = (
    "attention_backend",
    "decode_attention_backend",
    "prefill_attention_backend",
    "moe_runner_backend",
    "moe_a2a_backend",
    "fp8_gemm_runner_backend",
    "fp4_gemm_runner_backend",
    "kv_cache_dtype",
    "speculative_moe_runner_backend",
    "disable_shared_experts_fusion",
    "rl_on_policy_target",
    "enable_lora",
)
"""Options that choose kernels, and with them the layout of post-processed weights."""

PARALLEL = (
    "ep_size",
    "dp_size",
    "attn_dp_size",
    "attn_cp_size",
    "dcp_size",
    "dwdp_size",
    "moe_dp_size",
    "moe_dense_tp_size",
    "shared_experts_tp_size",
    "enable_dp_attention",
    "enable_dp_lm_head",
    "enable_shared_experts_attn_tp",
    "enable_dense_mlp_attn_tp",
    "mm_enable_dp_encoder",
    "ep_num_redundant_experts",
)
"""Options that say how weights are divided among ranks, besides those that the groups of ranks tell of."""


def expected_identity(model_config: Any, load_config: Any, *, content: str, extra: Mapping[str, str]) -> Identity:
    """The identity of the weights that this rank needs.

    Args:
        model_config: A ``ModelConfig`` of SGLang.
        load_config: A ``LoadConfig``.
        content: Digest of the checkpoint's bytes; `DUMMY` if none are read, empty if unknown.
        extra: What the user added.
    """
    quantisation = plain(getattr(model_config.hf_config, "quantization_config", None), _NOT_OF_THE_LAYOUT)
    fields = {
        "content": content,
        "load": "dummy" if content == DUMMY else "",  # unlike the content, always compared: random weights are nobody else's
        "model": whereabouts(str(model_config.model_path)),
        "revision": str(model_config.revision or ""),
        "engine": "sglang",
        "engine_version": installed_version(DISTRIBUTIONS),
        "torch_version": str(torch.__version__),
        "device": device_name(is_cpu=is_cpu()),
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization or ""),
        "quantization_config": digest_of(quantisation) if quantisation else "",
        "architecture": ",".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "model_config": digest_of(plain(model_config.hf_config, _NOT_OF_THE_LAYOUT)),
        "model_impl": str(getattr(model_config.model_impl, "value", model_config.model_impl)),
        "draft": str(load_config.draft_model_idx or 0) if model_config.is_draft_model else "",
        "max_model_len": str(model_config.context_len),  # sizes rotary caches, which are published with the weights
        **_parallel(),
        **_kernels(),
        **{f"x-{name}": value for name, value in extra.items()},
    }
    return Identity({name: value for name, value in fields.items() if value})


def _parallel() -> dict[str, str]:
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group

    groups = {"tp": get_tp_group(), "pp": get_pp_group()}
    chosen = {name: argument(name) for name in PARALLEL}
    return {
        **{name: f"{group.rank_in_group}/{group.world_size}" for name, group in groups.items()},
        **{name: str(value) for name, value in chosen.items() if value not in (None, 0, 1, False)},
        "init_expert_location": expert_location(argument("init_expert_location")),
    }


def expert_location(value: str | None) -> str:
    """Where experts are at first, by what a file says, wherever it lies."""
    if value and value.endswith((".json", ".pt")) and (path := Path(value)).is_file():
        return f"blake2b:{hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}"
    return value or ""


def _kernels() -> dict[str, str]:
    chosen = {name: argument(name) for name in KERNELS}
    return {
        **{name: str(value) for name, value in chosen.items() if value},
        "environment": ",".join(f"{name}={value}" for name, value in variables().items()),
    }


def variables() -> dict[str, str]:
    """SGLang's environment variables that may decide what weights look like."""
    return {name: value for name, value in engine_variables(_VARIABLE).items() if not _OF_NO_WEIGHT.search(name)}
