"""What cannot be combined with shared weights, each refused with the reason and what to do about it."""

from __future__ import annotations

import json
from typing import Any

import torch

from gms_core.config import settings
from gms_core.errors import ConfigurationError, EngineUnsupported
from gms_core.failover.config import failover_config
from gms_core.weights.identity import DUMMY
from gms_core.weights.options import LoaderOptions, loader_options
from gms_patches.apply import installed_version
from gms_patches.check import in_range
from gms_patches.for_sglang import DISTRIBUTIONS, TESTED
from gms_sglang.arguments import Option
from gms_sglang.load_format import asks_for_gms
from gms_sglang.refused_failover import check_memory

STOCK = "Use SGLang's own --load-format for this engine."

NO_INNER = {
    "gms": "a GMS loader cannot read the checkpoint for itself",
    "ipc_cache": "it shares the weights of another daemon",
    "bitsandbytes": "its weights cannot be shared after post-processing",
    "flash_rl": "it writes new weights into those that are there",
    "gguf": "SGLang chooses its quantisation by --load-format",
    "remote_instance": "it registers the weights with other engines, which GMS does in its place",
}
"""Load formats of SGLang that cannot read for GMS, and why."""


_QUANTISES = ("modelopt", "modelopt_fp8", "auto-round-int8")
"""Methods that quantise a checkpoint which is not quantised yet (sglang/srt/model_loader/loader.py, ModelOptModelLoader and IncModelLoader)."""


def engine_options(extra: object) -> LoaderOptions:
    """Split the value of ``--model-loader-extra-config``, which may still be JSON.

    Raises:
        ConfigurationError: It is no mapping, or the block has an unknown key or a wrong value.
    """
    if isinstance(extra, str):
        try:
            extra = json.loads(extra) if extra.strip() else {}
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"--model-loader-extra-config is no JSON: {error}", hint="Write it such as '{\"gms\": {}}'.") from error
    return loader_options(extra or {}, NO_INNER)


def check_engine(device: str) -> None:
    """Refuse versions of SGLang that nothing was tested with, and devices that GMS has no driver for.

    Args:
        device: The option.
    """
    version = installed_version(DISTRIBUTIONS)
    if not in_range(version, TESTED) and not settings().allow_untested_engine:
        raise EngineUnsupported(
            f"--load-format gms was tested with SGLang {TESTED}, not with {version or 'an unknown version'}",
            hint="Install such a version, update GMS, or set GMS_ALLOW_UNTESTED_ENGINE=1 at your own risk; `gms patches check` shows what differs.",
        )
    if device.partition(":")[0] not in ("cuda", "cpu") or (device != "cpu" and torch.version.hip):
        raise EngineUnsupported(f"--load-format gms works on NVIDIA GPUs and on CPUs, not on {device}", hint=STOCK)


def check_options(option: Option, *, asked: bool) -> None:
    """Refuse what moves, replaces or rewrites weights after they are loaded, and what takes their place.

    Args:
        option: The engine's options, resolved.
        asked: Whether the user asked for this load format for the model itself.

    Raises:
        EngineUnsupported: Says what, why, and what to do.
        ConfigurationError: The block for GMS is wrong.
    """
    options = engine_options(option("model_loader_extra_config"))
    if failover_config(options.gms) is not None:
        check_memory(option)
    for refused, what, fix in (*_loading(option, asked), *_writing(option), *_elsewhere(option), *_allocators(option), *_drafts(option)):
        if refused:
            raise EngineUnsupported(f"--load-format gms: {what}", hint=fix)


def check_quantisation(model_config: Any, inner: str) -> None:
    """Refuse to quantise while loading, where SGLang does so with a tool of its own that replaces the model or its configuration.

    Args:
        model_config: A ``ModelConfig`` of SGLang.
        inner: The load format that reads the checkpoint.

    Raises:
        EngineUnsupported: Says which method.
    """
    method = model_config.quantization
    if inner != DUMMY and method in _QUANTISES and not model_config._is_already_quantized():  # noqa: SLF001 - what SGLang's own loaders ask
        raise EngineUnsupported(
            f"--load-format gms: --quantization {method} quantises {model_config.model_path} while it loads, with calibration of its own",
            hint="Quantise it once, export it, and serve what was exported.",
        )


def tolerate_neighbours() -> None:
    """Let ranks start whose devices have different amounts of free memory: other engines may be on one of them, or load there just now."""
    from sglang.srt.environ import envs

    if not envs.SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK.is_set():
        envs.SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK.set(False)


_Refusal = tuple[Any, str, str]


def _loading(option: Option, asked: bool) -> tuple[_Refusal, ...]:
    chosen = option("load_format")
    return (
        (
            asked and not asks_for_gms(chosen),
            f"SGLang chose the load format {chosen!r} for {option('model_path')} by itself",
            "Download the model to a folder first, or use SGLang's own load format for it.",
        ),
        (
            option("quantization") in ("bitsandbytes", "gguf"),
            f"{option('quantization')} has a load format of its own, whose weights cannot be shared",
            STOCK,
        ),
        (
            option("modelopt_quant") or option("quantize_and_serve"),
            "a model that ModelOpt quantises while it loads is not what its checkpoint says",
            "Quantise it once, export it, and serve what was exported.",
        ),
        (option("torchao_config"), "torchao replaces weights after they are loaded", "Leave --torchao-config out, or serve a quantised checkpoint."),
        (
            option("startup_weight_load_mode") not in (None, "serial"),
            "weights that are read while CUDA graphs are captured are written to after they are shared",
            "Leave --startup-weight-load-mode out.",
        ),
        (option("encoder_only"), "a server of encoders alone has no scheduler that could publish", STOCK),
    )


def _writing(option: Option) -> tuple[_Refusal, ...]:
    return (
        (option("enable_eplb"), "the expert load balancer rewrites expert weights while the engine runs", "Start without --enable-eplb."),
        (
            option("elastic_ep_backend") not in (None, "none"),
            "elastic expert parallelism moves expert weights while the engine runs",
            "Start without --elastic-ep-backend.",
        ),
        (
            option("rl_quant_profile"),
            "FlashRL writes new weights into those that are there",
            "Start another engine for new weights, as a new generation.",
        ),
    )


def _elsewhere(option: Option) -> tuple[_Refusal, ...]:
    backup = "a copy of the weights in host memory is what GMS makes unnecessary, and writing it back is not possible"
    return (
        (
            (option("cpu_offload_gb") or 0) > 0 or (option("offload_group_size") or -1) > 0 or option("ple_offload_embedding"),
            "weights that are offloaded to host memory cannot be shared",
            "Start without --cpu-offload-gb, --offload-group-size and --ple-offload-embedding.",
        ),
        (option("kt_weight_path"), "expert weights that KTransformers keeps on the host cannot be shared", "Start without --kt-weight-path."),
        (option("enable_weights_cpu_backup"), backup, "Start without --enable-weights-cpu-backup."),
        (option("enable_draft_weights_cpu_backup"), backup, "Start without --enable-draft-weights-cpu-backup."),
        (
            option("weight_cache_mode") not in (None, "off"),
            "SGLang's own weight cache shares weights too, from a daemon of its own",
            "Start without --weight-cache-mode.",
        ),
    )


def _allocators(option: Option) -> tuple[_Refusal, ...]:
    from sglang.srt.environ import envs

    return (
        (
            option("enable_memory_saver"),
            "torch_memory_saver would take away what is not in the server's memory",
            "Start without --enable-memory-saver: memory is released and resumed without it.",
        ),
        (
            envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get(),
            "a KV cache that grows into what is free once CUDA graphs are captured takes the memory that other engines were promised",
            "Unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.",
        ),
        (
            envs.SGLANG_MOONCAKE_CUSTOM_MEM_POOL.get(),
            "Mooncake's memory pool allocates in the place of the one that weights and KV memory are shared through",
            "Unset SGLANG_MOONCAKE_CUSTOM_MEM_POOL.",
        ),
    )


def _drafts(option: Option) -> tuple[_Refusal, ...]:
    from sglang.srt.environ import envs

    last_stage_only = getattr(envs, "SGLANG_ENABLE_PP_SPEC", None)
    return (
        (
            option("speculative_algorithm")
            and (option("pp_size") or 1) > 1
            and asks_for_gms(option("speculative_draft_load_format") or option("load_format"))
            and last_stage_only is not None
            and last_stage_only.get(),
            "with SGLANG_ENABLE_PP_SPEC only the last pipeline stage loads the draft model, and the others would be waited for",
            "Give the draft model a --speculative-draft-load-format of SGLang's own, or unset SGLANG_ENABLE_PP_SPEC.",
        ),
    )
