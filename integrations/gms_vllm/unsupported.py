"""What cannot be combined with shared weights, each refused with the reason and what to do about it. Light: the front end asks it too."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import vllm.envs as envs
import vllm.model_executor.utils as executor_utils
from vllm.platforms import current_platform

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig
from gms_core.errors import EngineUnsupported
from gms_patches.apply import installed_version
from gms_patches.check import in_range
from gms_patches.for_vllm import DISTRIBUTIONS, TESTED

STOCK = "Use vLLM's own --load-format for this engine."
WORKER = "gms_vllm.worker.GmsWorker"
_WORKER_HINT = "Leave --worker-cls out, or derive your class from gms_vllm.worker.GmsWorkerMixin (first) and from vLLM's worker."
_NO_FAILOVER = "Leave failover out of the block gms (and out of GMS_FAILOVER) for this engine."
_EXECUTORS = (None, "mp", "uni")


def has_processed_flag() -> bool:
    """Whether this vLLM can be told that weights are post-processed already (from 0.30 on)."""
    return hasattr(executor_utils, "weights_already_processed")


def check_engine() -> None:
    """Refuse versions of vLLM that nothing was tested with, and devices that GMS has no driver for."""
    version = installed_version(DISTRIBUTIONS)
    if not in_range(version, TESTED) and not settings().allow_untested_engine:
        raise EngineUnsupported(
            f"--load-format gms was tested with vLLM {TESTED}, not with {version or 'an unknown version'}",
            hint="Install such a version, update GMS, or set GMS_ALLOW_UNTESTED_ENGINE=1 at your own risk; `gms patches check` shows what differs.",
        )
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise EngineUnsupported(f"--load-format gms works on NVIDIA GPUs and on CPUs, not on {current_platform.device_name}", hint=STOCK)
    if current_platform.is_cpu() and not has_processed_flag():
        raise EngineUnsupported(
            "--load-format gms on CPUs needs a vLLM that can take weights that are post-processed already", hint="Use vLLM 0.30 or later."
        )
    if current_platform.is_cpu() and getattr(current_platform, "is_zen_cpu", bool)():
        raise EngineUnsupported(
            "zentorch packs weights into memory of its own, which cannot be shared", hint="Uninstall zentorch in this environment."
        )


def check_arguments(arguments: Any) -> None:
    """Refuse, before a configuration is made, what would silently replace the load format.

    Args:
        arguments: ``EngineArgs``.
    """
    if arguments.quantization == "bitsandbytes":
        raise EngineUnsupported("bitsandbytes has a load format of its own, which cannot be combined with --load-format gms", hint=STOCK)


def check_config(config: Any) -> None:
    """Refuse what moves, replaces or rewrites weights after they are loaded.

    Args:
        config: A ``VllmConfig``.
    """
    parallel, model = config.parallel_config, config.model_config
    for refused, what, fix in (
        (config.load_config.load_format != "gms", f"vLLM chose the load format {config.load_config.load_format!r} by itself", STOCK),
        (parallel.enable_eplb, "the expert load balancer rewrites expert weights while the engine runs", "Start without --enable-eplb."),
        (parallel.enable_elastic_ep, "elastic expert parallelism loads weights again while the engine runs", "Start without --enable-elastic-ep."),
        (
            _offloads(config),
            "weights that are offloaded to host memory cannot be shared",
            "Start without --cpu-offload-gb and the --offload options.",
        ),
        (config.weight_transfer_config is not None, "weights that are updated in place cannot be shared", "Start without --weight-transfer-config."),
        (
            model.enable_sleep_mode and config.kv_transfer_config is not None,
            "a KV connector registers memory that sleep mode takes away",
            "Start without --enable-sleep-mode, or without --kv-transfer-config and KV offloading.",
        ),
        (
            model.enable_sleep_mode and getattr(model, "sleep_mode_offload_cudagraph", False),
            "CUDA graphs stay where they are while the engine sleeps",
            "Start without --sleep-mode-offload-cudagraph.",
        ),
        (
            _other_device(config),
            "weights that are loaded to another device are moved afterwards and cannot be shared",
            "Leave the load device unset.",
        ),
    ):
        if refused:
            raise EngineUnsupported(f"--load-format gms: {what}", hint=fix)


def check_worker(chosen: str) -> None:
    """Refuse a worker class that does not understand shared weights.

    Args:
        chosen: Its qualified name.
    """
    if chosen == WORKER:
        return
    from gms_vllm.worker import GmsWorkerMixin

    module, _, name = chosen.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EngineUnsupported(f"--worker-cls {chosen} cannot be imported: {error}", hint=_WORKER_HINT) from error
    if not (isinstance(found, type) and issubclass(found, GmsWorkerMixin)):
        raise EngineUnsupported(f"--worker-cls {chosen} does not understand weights that GMS shares", hint=_WORKER_HINT)


_NODES = 'Name a secret and a port in the failover block: {"nodes": {"secret_file": "/FILE", "port": PORT}}.'


def check_failover(config: Any, failover: FailoverConfig, *, api_servers: int, headless: bool) -> None:
    """Refuse engines that cannot be primaries and shadows of one another.

    Args:
        config: A ``VllmConfig``.
        failover: How it is to fail over.
        api_servers: How many it has.
        headless: Whether there is no API server on this node.
    """
    parallel = config.parallel_config
    several = parallel.nnodes > 1
    for refused, what, fix in (
        (headless and not several, "an engine without an API server has nothing to fail over", _NO_FAILOVER),
        (several and failover.nodes is None, "the nodes of an engine over several nodes need to know of each other", _NODES),
        (several and not settings().engine, "an engine over several nodes needs a name, the same on all of them", "Set GMS_ENGINE."),
        (several and api_servers > 1, "an engine over several nodes can have one API server", "Leave --api-server-count out."),
        (
            parallel.data_parallel_size > 1,
            "engines with data parallelism do not fail over yet",
            "Start one engine for each rank, each with a lock and a port of its own.",
        ),
        (
            parallel.distributed_executor_backend not in _EXECUTORS,
            f"ranks that the executor {parallel.distributed_executor_backend!r} has started do not end with their engine",
            "Use --distributed-executor-backend mp.",
        ),
        (
            config.kv_transfer_config is not None,
            "a KV connector registers memory that a shadow does not have yet",
            "Start without --kv-transfer-config and without KV offloading.",
        ),
        (envs.VLLM_USE_RUST_FRONTEND, "the Rust front end cannot be held until its engine is promoted", "Unset VLLM_USE_RUST_FRONTEND."),
    ):
        if refused:
            raise EngineUnsupported(f"failover: {what}", hint=fix)


def _offloads(config: Any) -> bool:
    offload = config.offload_config
    return bool(offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0)


def _other_device(config: Any) -> bool:
    asked = config.load_config.device
    return asked is not None and torch.device(asked).type != current_platform.device_type


def is_draft(config: Any, model_config: Any) -> bool:
    """Whether the model that is loaded is the draft of speculative decoding, which stays private to the engine."""
    speculative = config.speculative_config
    return model_config.runner_type == "draft" or (speculative is not None and model_config is speculative.draft_model_config)
