"""GMS for vLLM: `--load-format gms`.

vLLM calls `register` in each of its processes. It imports nothing of vLLM: what it has to add is added once the module concerned is imported.
"""

from __future__ import annotations

import logging
from functools import partial

from gms_core.config import settings
from gms_core.engine_log import log_as
from gms_core.errors import ConfigurationError
from gms_core.failover.parent_death import end_with_parent
from gms_patches.on_import import when_imported

LOG = "vllm.gms"
"""Below vLLM's own logger, whose handlers and level it shares."""

log = logging.getLogger(LOG)


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Without ``--load-format gms`` it changes nothing that can be seen."""
    log_as(LOG)  # not when it is imported: `gms_core.plugins` imports the adapters of all engines in each of them
    if _cohort():
        # Not guarded as the rest is: an engine whose processes outlive one another must not take part in a failover.
        end_with_parent()
        when_imported("vllm.v1.engine.core", _extend_engine_core)
    when_imported("vllm.model_executor.model_loader", _register_loader)
    when_imported("vllm.engine.arg_utils", _patch_engine_args)
    _patch_front_end()


def _cohort() -> str:
    """The cohort of an engine that fails over, in each of the processes that its first one has started."""
    try:
        return settings().cohort
    except ConfigurationError:  # the first process does not start an engine that fails over in such an environment
        log.exception("the environment of GMS is not in order")
        return ""


def _register_loader() -> None:
    try:
        from gms_vllm.loader import register_loader

        register_loader()
    except Exception:  # a damaged GMS must not stop engines that do not use it
        log.exception("--load-format gms is not available")


def _patch_engine_args() -> None:
    try:
        from gms_vllm.engine_args import patch_engine_args

        patch_engine_args()
    except Exception:  # as above
        log.exception("--load-format gms is not available")


def _extend_engine_core() -> None:
    from gms_vllm.engine_core import extend_engine_core

    extend_engine_core()


def _patch_front_end() -> None:
    try:
        from gms_vllm.serving import PATCHED, patch_front_end

        for module in PATCHED:
            when_imported(module, partial(patch_front_end, module))
    except Exception:  # as above
        log.exception("failover is not available")
