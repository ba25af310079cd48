"""Options of the loader: the block ``gms`` of vLLM's ``--model-loader-extra-config``; all other keys belong to the inner loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config.load import LoadConfig

from gms_core.engine_config import GmsConfig, parse_block
from gms_core.errors import ConfigurationError, EngineUnsupported

LOAD_FORMAT = "gms"
BLOCK = "gms"
WHERE = "--model-loader-extra-config: gms"

OBJECT_STORES = ("s3://", "gs://", "az://")
"""Schemes that vLLM reads with a streaming loader only (vllm/transformers_utils/runai_utils.py)."""
STREAMING_LOADERS = ("runai_streamer", "runai_streamer_sharded", "modelexpress")
_NO_INNER = {
    LOAD_FORMAT: "a GMS loader cannot read the checkpoint for itself",
    "ipc_cache": "it shares the weights of another daemon",
    "bitsandbytes": "its weights cannot be shared after post-processing",
}


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """What the user wrote.

    Attributes:
        gms: The block for GMS.
        rest: Every other key, for the inner loader.
    """

    gms: GmsConfig
    rest: Mapping[str, Any]


def loader_options(extra: object) -> LoaderOptions:
    """Split the value of ``model_loader_extra_config``.

    Raises:
        ConfigurationError: It is no mapping, or the block has an unknown key or a wrong value.
    """
    if not isinstance(extra, Mapping):
        raise ConfigurationError(
            f"--model-loader-extra-config is a {type(extra).__name__}, not a mapping", hint='Write it as JSON, such as {"gms": {}}.'
        )
    rest = dict(extra)
    options = LoaderOptions(parse_block(rest.pop(BLOCK, None), where=WHERE), rest)
    reason = _NO_INNER.get(options.gms.inner.lower())
    if reason is not None:
        raise ConfigurationError(
            f"{WHERE}: inner: {options.gms.inner!r} cannot be used, because {reason}", hint="Leave it out, or name a loader that reads files."
        )
    return options


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
