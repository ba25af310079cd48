"""What `--load-format gms` changes while vLLM makes its configuration, in the process that the user started."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_patches.apply import apply
from gms_patches.for_vllm import CREATE_ENGINE_CONFIG

log = logging.getLogger("vllm.gms")


def patch_engine_args() -> None:
    """Wrap ``EngineArgs.create_engine_config``. On a vLLM that the patch does not know, nothing changes and only `--load-format gms` will refuse."""
    try:
        apply(CREATE_ENGINE_CONFIG, _wrap)
    except EngineUnsupported as error:
        log.debug("--load-format gms is not available: %s", error)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, headless: bool = False) -> Any:
        if str(self.load_format).lower() != "gms":
            return original(self, usage_context, headless)
        return _create(self, lambda: original(self, usage_context, headless), usage_context, headless)

    return create_engine_config


def _create(arguments: Any, create: Callable[[], Any], usage_context: Any, headless: bool) -> Any:
    from gms_core.failover.config import failover_config
    from gms_core.weights.options import LOAD_FORMAT
    from gms_vllm.config import OBJECT_STORES, loader_options, streaming_inner
    from gms_vllm.failover import begin_failover
    from gms_vllm.sleep_mode import set_sleep_mode, stock_sleep_mode_off
    from gms_vllm.unsupported import WORKER, check_arguments, check_config, check_engine, check_worker

    check_engine()
    check_arguments(arguments)
    options = loader_options(arguments.model_loader_extra_config or {})
    failover = failover_config(options.gms)
    worker = WORKER if arguments.worker_cls == "auto" else str(arguments.worker_cls)
    check_worker(worker)
    before = arguments.load_format
    place = str(getattr(arguments, "model_weights", "") or arguments.model)
    if place.lower().startswith(OBJECT_STORES):
        # vLLM insists on a streaming load format for such models (vllm/config/vllm.py, is_runai_obj_uri) before any loader is asked.
        inner = streaming_inner(options, place)
        arguments.load_format = inner
        arguments.model_loader_extra_config = {**options.rest, "gms": {**options.gms.model_dump(mode="json", exclude_unset=True), "inner": inner}}
    try:
        with stock_sleep_mode_off(arguments) as sleeps:
            config = create()
    finally:
        arguments.load_format = before
    if sleeps:
        set_sleep_mode(config)
    if place.lower().startswith(OBJECT_STORES):
        config.load_config.load_format = LOAD_FORMAT
    check_config(config)
    config.parallel_config.worker_cls = worker
    if failover is not None:
        begin_failover(arguments, config, failover, usage_context, headless=headless)
    return config
