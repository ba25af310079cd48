"""The loader of the load format ``gms``: publish what is not published yet, attach to what is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import BaseModelLoader, get_model_loader

from gms_core.client import WriteLease
from gms_core.pytorch.device import free_memory
from gms_core.weights.holdings import commit_due, defer_commits
from gms_core.weights.identity import known_content
from gms_core.weights.leases import acquire
from gms_core.weights.loading import publish_or_attach
from gms_core.weights.options import LoaderOptions
from gms_patches.for_sglang import GET_MODEL_LOADER_BEFORE, RUN_EVENT_LOOP
from gms_sglang import (
    accounting,
    building,
    kv_pools,
    load_format,
    memory_saver,
    reader,
    scheduler_calls,
    shadow,
    sleep,
    standing,
    updates,
    writer,
)
from gms_sglang.arguments import argument
from gms_sglang.files import check_checkpoint, weight_files
from gms_sglang.hooks import Hook, engage
from gms_sglang.identity import expected_identity
from gms_sglang.place import LoadRequest, all_ranks, connect, pool_name
from gms_sglang.unsupported import check_engine, check_options, check_quantisation, engine_options


class GmsModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads a model through GMS. Making one connects to nothing."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options: LoaderOptions = engine_options(load_config.model_loader_extra_config)
        self.preloaded_weights_bytes = 0

    def download_model(self, model_config: Any) -> None:
        """Fetch the checkpoint, unless this engine only ever attaches."""
        if self.options.gms.mode != "ro":
            self._inner(model_config).download_model(model_config)

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Publish or attach.

        Raises:
            GmsError: Neither was possible; the message says why. Nothing of this engine is left in the server.
        """
        check_engine(str(argument("device")))
        check_options(argument, asked=not model_config.is_draft_model)
        engage(HOOKS)
        defer_commits()
        options = self.options.gms
        inner = options.inner.lower()
        check_quantisation(model_config, inner)
        request = LoadRequest(model_config, device_config, self._inner_config())
        files = weight_files(model_config, inner, self.load_config.download_dir)
        identity = expected_identity(model_config, self.load_config, content=known_content(files, inner), extra=options.identity)
        if not model_config.is_draft_model:
            shadow.begin(identity)
        session = connect(options)

        def publish(lease: WriteLease) -> tuple[torch.nn.Module, bytes]:
            check_checkpoint(model_config, inner)
            return writer.load(request, self._inner(model_config), lease)

        model, holding = publish_or_attach(
            session,
            lambda: acquire(session, pool_name(options, model_config, self.load_config), identity, options, all_ranks),
            publish=publish,
            attach=partial(reader.attach, request),
            free_memory=free_memory,
            identity=identity,
            files=files,
        )
        self.preloaded_weights_bytes = accounting.preloaded_bytes(holding)
        return model

    def _inner(self, model_config: Any) -> BaseModelLoader:
        return get_model_loader(self._inner_config(), model_config)

    def _inner_config(self) -> LoadConfig:
        """The configuration of SGLang's own loader that reads the checkpoint."""
        return dataclasses.replace(self.load_config, load_format=self.options.gms.inner.lower(), model_loader_extra_config=dict(self.options.rest))


def _publish_first(*_: Any, **__: Any) -> None:
    """An engine that publishes measures its memory first: a reader that attached meanwhile would be in the measurement."""
    commit_due()


def _class_first(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """What later versions do themselves."""
    return GmsModelLoader(load_config) if load_config.load_format is GmsModelLoader else original(load_config, model_config)


HOOKS = (
    *load_format.HOOKS,
    *building.HOOKS,
    *updates.HOOKS,
    *accounting.HOOKS,
    *memory_saver.HOOKS,
    *kv_pools.HOOKS,
    *shadow.HOOKS,
    *standing.HOOKS,
    *sleep.HOOKS,
    *scheduler_calls.HOOKS,
    Hook(RUN_EVENT_LOOP, "before", _publish_first),
    Hook(GET_MODEL_LOADER_BEFORE, "around", _class_first),
)
"""All that loading needs. They are put in place once a process is asked for this load format, for their modules are heavy."""


def prepare() -> None:
    """Put all hooks in place.

    Raises:
        EngineUnsupported: One of them cannot be.
    """
    engage(HOOKS)
