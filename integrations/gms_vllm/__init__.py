"""GMS for vLLM: `--load-format gms`.

vLLM calls `register` in each of its processes. It imports nothing of vLLM: what it has to add is added once the module concerned is imported.
"""

from __future__ import annotations

import logging

from gms_patches.on_import import when_imported

log = logging.getLogger("vllm.gms")


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Without ``--load-format gms`` it changes nothing that can be seen."""
    when_imported("vllm.model_executor.model_loader", _register_loader)
    when_imported("vllm.engine.arg_utils", _patch_engine_args)


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
