"""What decides whether weights that another engine has loaded are those that this one needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import vllm.envs as envs
from vllm.platforms import current_platform

from gms_core.layout import Identity
from gms_core.pytorch.device import device_name
from gms_core.weights.identity import DUMMY, digest_of, plain, whereabouts
from gms_patches.apply import installed_version
from gms_patches.for_vllm import DISTRIBUTIONS

_NOT_OF_THE_LAYOUT = frozenset(
    {"_name_or_path", "transformers_version", "tie_word_embeddings", "_commit_hash", "dtype", "torch_dtype", "quantization_config"}
)
"""Keys of a model's configuration that say where it came from, or that have a field of their own. vLLM changes ``tie_word_embeddings`` by what it
finds in the checkpoint (0.30 on), which a reader may not see; the tensor manifest says which tensors are tied."""

_KERNEL_SWITCH = re.compile(r"MOE|GEMM|FP8|FP4|MARLIN|FLASHINFER|AITER|CUTLASS|QUANT|BATCH_INVARIANT|SHUFFLE|PADDING")
"""Environment variables of vLLM that choose kernels, and with them the layout of post-processed weights."""


def expected_identity(config: Any, model_config: Any, *, content: str, extra: Mapping[str, str]) -> Identity:
    """The identity of the weights that this rank needs. To be asked before loading, which changes the configuration.

    Args:
        config: A ``VllmConfig``.
        model_config: Of the model that is loaded.
        content: Digest of the checkpoint's bytes; `DUMMY` if none are read, empty if unknown.
        extra: What the user added.
    """
    quantisation = {
        "checkpoint": plain(getattr(model_config.hf_config, "quantization_config", None), _NOT_OF_THE_LAYOUT),
        "runtime": plain(_runtime_quantisation(model_config), _NOT_OF_THE_LAYOUT),
    }
    fields = {
        "content": content,
        "load": "dummy" if content == DUMMY else "",  # unlike the content, always compared: random weights are nobody else's
        "model": model_place(model_config),
        "revision": str(model_config.revision or ""),
        "engine": "vllm",
        "engine_version": installed_version(DISTRIBUTIONS),
        "torch_version": str(torch.__version__),
        "device": device_name(is_cpu=current_platform.is_cpu()),
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization or ""),
        "quantization_config": digest_of(quantisation) if any(quantisation.values()) else "",
        "architecture": ",".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "model_config": digest_of(plain(model_config.hf_config, _NOT_OF_THE_LAYOUT)),
        "model_impl": str(model_config.model_impl),
        "max_model_len": str(model_config.max_model_len),  # sizes rotary caches, which are published with the weights, and chooses their variant
        **_parallel(config),
        **_kernels(config),
        **{f"x-{name}": value for name, value in extra.items()},
    }
    return Identity({name: value for name, value in fields.items() if value})


def model_place(model_config: Any) -> str:
    """Where the model comes from: a folder, with links resolved, or a name."""
    return whereabouts(str(getattr(model_config, "model_weights", "") or model_config.model))


def _runtime_quantisation(model_config: Any) -> object:
    return getattr(model_config, "quantization_config", None)


def _parallel(config: Any) -> dict[str, str]:
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    parallel = config.parallel_config
    ranks = {"tp": get_tp_group(), "pp": get_pp_group()}
    fields = {name: f"{group.rank_in_group}/{group.world_size}" for name, group in ranks.items()}
    if parallel.data_parallel_size > 1:
        fields["dp"] = f"{parallel.data_parallel_rank}/{parallel.data_parallel_size}"
    if parallel.enable_expert_parallel:
        fields["ep"] = str(parallel.expert_placement_strategy)
    if parallel.decode_context_parallel_size > 1:
        fields["dcp"] = str(parallel.decode_context_parallel_size)
    return fields


def _kernels(config: Any) -> dict[str, str]:
    kernel, cache = config.kernel_config, config.cache_config
    per_quantisation = getattr(kernel, "linear_backend_per_quant", None) or {}
    switches = sorted(name for name in envs.environment_variables if _KERNEL_SWITCH.search(name) and envs.is_set(name))
    return {
        "kv_cache_dtype": ",".join([str(cache.cache_dtype), *sorted(set(cache.kv_cache_dtype_skip_layers))]),
        "moe_backend": str(kernel.moe_backend),
        "linear_backend": ",".join([str(kernel.linear_backend), *(f"{key}={value}" for key, value in sorted(per_quantisation.items()))]),
        "attention_backend": str(getattr(config.attention_config.backend, "name", "") or ""),
        "kernel_switches": ",".join(f"{name}={getattr(envs, name)}" for name in switches),
    }
