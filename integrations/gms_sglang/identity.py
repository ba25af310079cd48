"""What decides whether weights that another engine has loaded are those that this one needs."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import Any

import torch

from gms_core.config import engine_variables
from gms_core.layout import Identity
from gms_core.weights.identity import DUMMY, digest_of, plain, whereabouts
from gms_patches.apply import installed_version
from gms_patches.for_sglang import DISTRIBUTIONS
from gms_sglang.arguments import argument
from gms_sglang.place import is_cpu

_NOT_OF_THE_LAYOUT = frozenset({"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", "quantization_config"})
"""Keys of a model's configuration that say where it came from, or that have a field of their own."""

_KERNEL_SWITCH = re.compile(r"^(SGLANG|SGL)_.*(MOE|GEMM|FP8|FP4|MARLIN|FLASHINFER|AITER|CUTLASS|QUANT|DEEPEP|SHUFFLE|PADDING|AMX)")
"""Environment variables of SGLang that choose kernels, and with them the layout of post-processed weights."""

_KERNELS = (
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
    "enable_dp_lm_head",
    "torchao_config",
)
"""Options that choose kernels, likewise."""


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
        "device": _device(),
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


def _device() -> str:
    if is_cpu():
        return f"cpu {platform.machine()}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}"


def _parallel() -> dict[str, str]:
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group

    groups = {"tp": get_tp_group(), "pp": get_pp_group()}
    fields = {name: f"{group.rank_in_group}/{group.world_size}" for name, group in groups.items()}
    for name in ("ep_size", "dp_size", "moe_dp_size", "moe_dense_tp_size", "enable_dp_attention", "init_expert_location", "ep_num_redundant_experts"):
        value = argument(name)
        fields[name] = "" if value in (None, 0, 1, False) else str(value)
    return fields


def _kernels() -> dict[str, str]:
    switches = engine_variables(_KERNEL_SWITCH)
    chosen = {name: argument(name) for name in _KERNELS}
    return {name: str(value) for name, value in chosen.items() if value} | {
        "kernel_switches": ",".join(f"{name}={value}" for name, value in switches.items())
    }
