"""What `--load-format gms` changes while vLLM makes its configuration, in the process that the user started."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from gms_core.errors import EngineUnsupported
from gms_patches.apply import apply
from gms_patches.for_vllm import CREATE_ENGINE_CONFIG

log = logging.getLogger("vllm.gms")

WORKER = "gms_vllm.worker.GmsWorker"
_WORKER_HINT = "Leave --worker-cls out, or derive your class from gms_vllm.worker.GmsWorkerMixin (first) and from vLLM's worker."


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
        return _create(self, lambda: original(self, usage_context, headless))

    return create_engine_config


def _create(arguments: Any, create: Callable[[], Any]) -> Any:
    from gms_vllm.config import LOAD_FORMAT, OBJECT_STORES, loader_options, streaming_inner
    from gms_vllm.unsupported import check_arguments, check_config, check_engine

    check_engine()
    check_arguments(arguments)
    options = loader_options(arguments.model_loader_extra_config or {})
    worker = _worker(str(arguments.worker_cls))
    before = arguments.load_format
    place = str(getattr(arguments, "model_weights", "") or arguments.model)
    if place.lower().startswith(OBJECT_STORES):
        # vLLM insists on a streaming load format for such models (vllm/config/vllm.py, is_runai_obj_uri) before any loader is asked.
        inner = streaming_inner(options, place)
        arguments.load_format = inner
        arguments.model_loader_extra_config = {**options.rest, "gms": {**options.gms.model_dump(mode="json"), "inner": inner}}
    try:
        config = create()
    finally:
        arguments.load_format = before
    if place.lower().startswith(OBJECT_STORES):
        config.load_config.load_format = LOAD_FORMAT
    check_config(config)
    config.parallel_config.worker_cls = worker
    return config


def _worker(chosen: str) -> str:
    """The worker class to use; the user's own one must understand shared weights."""
    if chosen in ("auto", WORKER):
        return WORKER
    from gms_vllm.worker import GmsWorkerMixin

    module, _, name = chosen.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EngineUnsupported(f"--worker-cls {chosen} cannot be imported: {error}", hint=_WORKER_HINT) from error
    if not (isinstance(found, type) and issubclass(found, GmsWorkerMixin)):
        raise EngineUnsupported(f"--worker-cls {chosen} does not understand weights that GMS shares", hint=_WORKER_HINT)
    return chosen
