"""What decides whether weights that another engine has loaded are those that this one needs."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm.envs as envs
from vllm.platforms import current_platform

from gms_core.checkpoint import cached_digest, content_digest
from gms_core.errors import IdentityMismatch
from gms_core.layout import Identity
from gms_patches.apply import installed_version
from gms_patches.for_vllm import DISTRIBUTIONS

log = logging.getLogger("vllm.gms")

DUMMY = "dummy"
"""The content of weights that are not read but made up."""

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
        "checkpoint": _plain(getattr(model_config.hf_config, "quantization_config", None)),
        "runtime": _plain(_runtime_quantisation(model_config)),
    }
    fields = {
        "content": content,
        "load": "dummy" if content == DUMMY else "",  # unlike the content, always compared: random weights are nobody else's
        "model": model_place(model_config),
        "revision": str(model_config.revision or ""),
        "engine": "vllm",
        "engine_version": installed_version(DISTRIBUTIONS),
        "torch_version": str(torch.__version__),
        "device": _device(),
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization or ""),
        "quantization_config": _hash(quantisation) if any(quantisation.values()) else "",
        "architecture": ",".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "model_config": _hash(_plain(model_config.hf_config)),
        "model_impl": str(model_config.model_impl),
        "max_model_len": str(model_config.max_model_len),  # sizes rotary caches, which are published with the weights, and chooses their variant
        **_parallel(config),
        **_kernels(config),
        **{f"x-{name}": value for name, value in extra.items()},
    }
    return Identity({name: value for name, value in fields.items() if value})


def check_content(files: Sequence[Path], published: Identity) -> None:
    """Compare a checkpoint whose digest was unknown when the lease was asked for with what was granted.

    The writer remembers the digest before it publishes; a checkpoint that is still unknown here is another one, or lies elsewhere, and is read.

    Args:
        files: The weight files that this engine would have read; nothing can be compared without.
        published: What the lease is on.

    Raises:
        IdentityMismatch: Something else was published.
        CheckpointNotFound: A file cannot be read.
    """
    found = published.fields.get("content", "")
    if not files or not found:
        log.warning("the digest of the checkpoint is not known: that the published weights are of the same content is not checked")
        return
    if cached_digest(files) is None:
        log.info("the checkpoint in %s is not known here: it is read once, to compare it with what is published", files[0].parent)
    content = content_digest(files)
    if content != found:
        difference = f"{content!r} != {found!r}"
        raise IdentityMismatch(
            f"the checkpoint in {files[0].parent} is not what is published: content: {difference} (expected != published)",
            hint="Use another tag for this checkpoint, or mode rw to publish it as a new generation.",
            details={"content": difference},
        )


def model_place(model_config: Any) -> str:
    """Where the model comes from: a folder, with links resolved, or a name."""
    place = str(getattr(model_config, "model_weights", "") or model_config.model)
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def _runtime_quantisation(model_config: Any) -> object:
    return getattr(model_config, "quantization_config", None)


def _device() -> str:
    if current_platform.is_cpu():
        return f"cpu {platform.machine()}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}"


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


def _plain(value: object) -> object:
    """A configuration as JSON can hold it, without the keys that do not alter the weights' layout."""
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        value = to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _NOT_OF_THE_LAYOUT}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _hash(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
