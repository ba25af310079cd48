"""Options of the loader: the block ``gms`` of vLLM's ``--model-loader-extra-config``; all other keys belong to the inner loader."""

from __future__ import annotations

import dataclasses

from vllm.config.load import LoadConfig

from gms_core.errors import EngineUnsupported
from gms_core.weights import options as weights_options
from gms_core.weights.options import LOAD_FORMAT, LoaderOptions

OBJECT_STORES = ("s3://", "gs://", "az://")
"""Schemes that vLLM reads with a streaming loader only (vllm/transformers_utils/runai_utils.py)."""
STREAMING_LOADERS = ("runai_streamer", "runai_streamer_sharded", "modelexpress")
_NO_INNER = {
    LOAD_FORMAT: "a GMS loader cannot read the checkpoint for itself",
    "ipc_cache": "it shares the weights of another daemon",
    "bitsandbytes": "its weights cannot be shared after post-processing",
}


def loader_options(extra: object) -> LoaderOptions:
    """Split the value of ``model_loader_extra_config``. See `gms_core.weights.options.loader_options`."""
    return weights_options.loader_options(extra, _NO_INNER)


def inner_load_config(load_config: LoadConfig, options: LoaderOptions, load_format: str | None = None) -> LoadConfig:
    """The configuration of the engine's own loader that reads the checkpoint."""
    return dataclasses.replace(load_config, load_format=load_format or options.gms.inner.lower(), model_loader_extra_config=dict(options.rest))


def streaming_inner(options: LoaderOptions, model: str) -> str:
    """The inner loader for a model in an object store.

    Raises:
        EngineUnsupported: The user named one that cannot read it.
    """
    inner = options.gms.inner.lower()
    if inner == "auto":
        return STREAMING_LOADERS[0]
    if inner not in STREAMING_LOADERS:
        raise EngineUnsupported(
            f"{model} is in an object store, which the inner loader {inner!r} cannot read",
            hint=f"Set inner to one of {', '.join(STREAMING_LOADERS)} in the block gms of --model-loader-extra-config, or leave it out.",
        )
    return inner
